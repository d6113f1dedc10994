"""The networks that the benchmarks measure; `tiny` ones exercise the same code in a second."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(dim), Attention(dim, heads), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 65, dim: int = 128, depth: int = 5, length: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits = self.head(self.norm(self.blocks(self.token(tokens) + self.place(places))))
        return logits.flatten(0, 1)


class Residual(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        same = stride == 1 and into == out
        self.skip = nn.Identity() if same else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


Setting = tuple[nn.Module, Tensor, Tensor]  # model, inputs, classes


def mlp(tiny: bool) -> Setting:
    wide, samples = (16, 8) if tiny else (256, 512)
    net = nn.Sequential(nn.Linear(784, wide), nn.Tanh(), nn.Linear(wide, wide), nn.Tanh(), nn.Linear(wide, 10))
    return net, torch.randn(samples, 784), torch.randint(0, 10, (samples,))


def gpt(tiny: bool) -> Setting:
    net = GPT(dim=16, depth=1) if tiny else GPT()
    return net, torch.randint(0, 65, (16, 64)), torch.randint(0, 65, (16 * 64,))


def resnet(tiny: bool) -> Setting:
    widths = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    body = [Residual(*w) for w in widths]
    net = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    samples, side = (4, 8) if tiny else (128, 32)
    return net.eval(), torch.randn(samples, 3, side, side), torch.randint(0, 10, (samples,))


def large_mlp(tiny: bool) -> Setting:
    """Width 4096, depth 64: 1.1 billion parameters."""
    width, samples = (16, 4) if tiny else (4096, 1024)
    net = nn.Sequential(*[part for _ in range(64) for part in (nn.Linear(width, width), nn.Tanh())])
    return net, torch.randn(samples, width), torch.randint(0, 10, (samples,))


def large_gpt(tiny: bool) -> Setting:
    """About 100 million parameters: 12 blocks of width 768, 12 heads, vocabulary 8192, sequence 512."""
    dim, depth, length, words = (24, 2, 16, 50) if tiny else (768, 12, 512, 8192)
    net = GPT(words, dim, depth, length, heads=12)
    return net, torch.randint(0, words, (8, length)), torch.randint(0, words, (8 * length,))
