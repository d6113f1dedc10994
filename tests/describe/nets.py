"""Small networks of the kinds people train: residual, normalised, post- and pre-activation, transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def identity(_width: int) -> nn.Module:
    """No norm."""
    return nn.Identity()


class HandWrittenRms(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class HandWrittenLayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.b


class PerceptronBlock(nn.Module):
    """x + factor * W2 phi(W1 norm(x))."""

    def __init__(
        self, width: int, norm: Callable[[int], nn.Module], activation: nn.Module, factor: float | Tensor
    ) -> None:
        super().__init__()
        self.norm, self.up, self.act = norm(width), nn.Linear(width, width), activation
        self.down, self.factor = nn.Linear(width, width), factor

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.act(self.up(self.norm(x))))
        return x + (y if isinstance(self.factor, float) and self.factor == 1.0 else self.factor * y)


class ResidualPerceptron(nn.Module):
    def __init__(
        self,
        width: int = 64,
        depth: int = 4,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        activation: Callable[[], nn.Module] = nn.GELU,
        factor: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(PerceptronBlock(width, norm, activation(), factor) for _ in range(depth))
        self.norm, self.head = norm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class BasicBlock(nn.Module):
    """The block of He et al. 2015: in-place sum and ReLU; `option` "A" pads channels, "B" projects."""

    def __init__(self, channels: int, out: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu, self.stride, self.pad = nn.ReLU(inplace=True), stride, out - channels
        self.down: nn.Module | None = None
        if out != channels and option == "B":
            self.down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x
        if self.down is not None:
            shortcut = self.down(x)
        elif self.pad:
            shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.pad))
        out += shortcut
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet-20 for `blocks` = 3."""

    def __init__(self, channels: int = 16, blocks: int = 3, option: str = "A") -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        widths = [channels, 2 * channels, 4 * channels]
        stages, before = [], channels
        for stage, width in enumerate(widths):
            row = []
            for i in range(blocks):
                row.append(BasicBlock(before, width, 2 if stage and not i else 1, option))
                before = width
            stages.append(nn.Sequential(*row))
        self.layer1, self.layer2, self.layer3 = stages
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(self.pool(x).flatten(1))


class PreActivationBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(functional.relu(self.bn2(self.conv1(functional.relu(self.bn1(x))))))


class PreActivationResNet(nn.Module):
    def __init__(self, channels: int = 16, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(*[PreActivationBlock(channels) for _ in range(blocks)])
        self.norm, self.fc = nn.BatchNorm2d(channels), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for t in self.c_attn(x).split(width, 2)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, width))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    """GPT-2: pre-norm, tied head, its initialisation."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2, words: int = 50, length: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.lm_head.weight = self.wte.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))
