"""Real module kinds, small and in float64: each function returns (module, inputs, targets, loss)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

Case = tuple[nn.Module, Any, Any, Callable[[Any, Any], Tensor]]


class Calls(nn.Module):
    """A module from a function of its named parts."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = forward

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _classes(n: int, *shape: int) -> Tensor:
    return torch.randint(0, n, shape)


def _case(module: nn.Module, inputs: Any, targets: Any, loss: Callable[[Any, Any], Tensor]) -> Case:
    return module.double(), inputs, targets, loss


def mlp_tanh() -> Case:
    return _case(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), _x(6, 4), _classes(3, 6), F.cross_entropy)


def mlp_relu_mse() -> Case:
    return _case(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), _x(5, 4), _x(5, 2), F.mse_loss)


def mlp_gelu_label_smoothing() -> Case:
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return _case(nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)), _x(6, 4), _classes(3, 6), loss)


def mlp_class_weights() -> Case:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    return _case(nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3)), _x(6, 4), _classes(3, 6), loss)


def mlp_bce() -> Case:
    net = nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 2))
    return _case(net, _x(5, 3), torch.rand(5, 2).double().round(), F.binary_cross_entropy_with_logits)


def mlp_huber() -> Case:
    return _case(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), _x(5, 3), 3 * _x(5, 2), F.huber_loss)


def prelu_bilinear() -> Case:
    net = Calls(lambda m, x: m.out(m.act(m.bi(x, x))), bi=nn.Bilinear(3, 3, 4), act=nn.PReLU(), out=nn.Linear(4, 2))
    return _case(net, _x(5, 3), _x(5, 2), F.mse_loss)


def cnn_maxpool() -> Case:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    return _case(net, _x(4, 1, 6, 6), _classes(3, 4), F.cross_entropy)


def cnn_depthwise_strided() -> Case:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 2, 1),
        nn.Flatten(),
        nn.Linear(18, 2),
    )
    return _case(net, _x(3, 2, 5, 5), _x(3, 2), F.mse_loss)


def conv_transpose_upsample() -> Case:
    net = nn.Sequential(
        nn.ConvTranspose2d(1, 2, 2, stride=2), nn.Tanh(), nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 3)
    )
    return _case(net, _x(2, 1, 3, 3), _x(2, 1, 10, 10), F.mse_loss)


def batchnorm_train() -> Case:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return _case(net.train(), _x(6, 4), _classes(3, 6), F.cross_entropy)


def batchnorm_eval() -> Case:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    return _case(net.eval(), _x(4, 1, 4, 4), _classes(3, 4), F.cross_entropy)


def layernorm() -> Case:
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))
    return _case(net, _x(6, 4), _classes(3, 6), F.cross_entropy)


def groupnorm() -> Case:
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(12, 2))
    return _case(net, _x(4, 2, 5), _x(4, 2), F.mse_loss)


def instancenorm() -> Case:
    net = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    )
    return _case(net, _x(4, 2, 5), _x(4, 2), F.mse_loss)


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rmsnorm_swiglu() -> Case:
    return _case(nn.Sequential(SwiGLU(4, 5), nn.Linear(4, 3)), _x(5, 4), _classes(3, 5), F.cross_entropy)


def dropout_train() -> Case:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3))
    return _case(net.train(), _x(6, 4), _classes(3, 6), F.cross_entropy)


def multihead_attention() -> Case:
    net = Calls(
        lambda m, x: m.head(m.attn(x, x, x, need_weights=False)[0].mean(1)),
        attn=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 2),
    )
    return _case(net, _x(3, 3, 4), _classes(2, 3), F.cross_entropy)


def transformer_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.1, batch_first=True)
    net = Calls(lambda m, x: m.head(m.layer(x)), layer=layer, head=nn.Linear(4, 2))
    return _case(net.train(), _x(2, 3, 4), _x(2, 3, 2), F.mse_loss)


class TiedGPT(nn.Module):
    def __init__(self, vocabulary: int = 5, dim: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True))


def tied_gpt_ignored_tokens() -> Case:
    tokens = _classes(5, 3, 4)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    return _case(TiedGPT(), tokens, targets, lambda out, t: F.cross_entropy(out.flatten(0, 1), t.flatten()))


def lstm() -> Case:
    net = Calls(lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(2, 3, batch_first=True), head=nn.Linear(3, 2))
    return _case(net, _x(3, 4, 2), _classes(2, 3), F.cross_entropy)


def gru() -> Case:
    net = Calls(lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=nn.GRU(2, 3, batch_first=True), head=nn.Linear(3, 2))
    return _case(net, _x(3, 4, 2), _x(3, 2), F.mse_loss)


def weight_normed() -> Case:
    net = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    return _case(net, _x(5, 3), _x(5, 2), F.mse_loss)


def weight_normed_by_hook() -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = nn.utils.weight_norm(nn.Linear(3, 4))
    return _case(nn.Sequential(first, nn.Tanh(), nn.Linear(4, 2)), _x(5, 3), _x(5, 2), F.mse_loss)


def spectral_normed_train() -> Case:
    net = nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    return _case(net.train(), _x(5, 3), _x(5, 2), F.mse_loss)


def frozen_first_layer() -> Case:
    module, *rest = mlp_tanh()
    module[0].requires_grad_(False)
    return (module, *rest)


def checkpointed() -> Case:
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    net = Calls(lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)), body=body, head=nn.Linear(5, 3))
    return _case(net, _x(6, 4), _classes(3, 6), F.cross_entropy)


def checkpointed_reentrant() -> Case:
    body = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    net = Calls(
        lambda m, x: m.head(checkpoint(m.body, m.first(x), use_reentrant=True)),
        first=nn.Linear(4, 5),
        body=body,
        head=nn.Linear(5, 3),
    )
    return _case(net, _x(6, 4), _classes(3, 6), F.cross_entropy)


class OldCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class NewCube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def old_style_function() -> Case:
    net = Calls(lambda m, x: m.b(OldCube.apply(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    return _case(net, _x(5, 3), _x(5, 2), F.mse_loss)


def new_style_function() -> Case:
    net = Calls(lambda m, x: m.b(NewCube.apply(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    return _case(net, _x(5, 3), _x(5, 2), F.mse_loss)


def embedding_bag() -> Case:
    net = nn.Sequential(nn.EmbeddingBag(6, 4, mode="mean"), nn.Tanh(), nn.Linear(4, 3))
    return _case(net, _classes(6, 5, 3), _classes(3, 5), F.cross_entropy)


def shared_layer() -> Case:
    net = Calls(
        lambda m, x: m.head(torch.tanh(m.body(torch.tanh(m.body(x))))),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, 2),
    )
    return _case(net, _x(5, 4), _x(5, 2), F.mse_loss)


class RunningMean(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.calls += 1
        return x - self.mean


def moving_average_buffer() -> Case:
    net = nn.Sequential(nn.Linear(4, 5), RunningMean(5), nn.Tanh(), nn.Linear(5, 2))
    return _case(net, _x(5, 4), _x(5, 2), F.mse_loss)


def data_dependent_loop() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(2 + int(x.shape[0] > 3)):
            x = x + torch.tanh(m.body(x))
        return m.head(x)

    return _case(Calls(forward, body=nn.Linear(3, 3), head=nn.Linear(3, 2)), _x(5, 3), _x(5, 2), F.mse_loss)


def numpy_in_forward() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        scale = float(x.detach().abs().mean().numpy())
        return m.b(torch.tanh(m.a(x / scale)))

    return _case(Calls(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), _x(5, 3), _x(5, 2), F.mse_loss)


def fourier_mixing() -> Case:
    net = Calls(lambda m, x: m.b(torch.tanh(torch.fft.fft(m.a(x)).real)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    return _case(net, _x(5, 3), _x(5, 2), F.mse_loss)


def two_inputs() -> Case:
    net = Calls(lambda m, x, y: m.b(torch.tanh(m.a(x)) * y), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    return _case(net, (_x(5, 3), _x(5, 4)), _x(5, 2), F.mse_loss)


MODULE_KINDS: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        mlp_tanh,
        mlp_relu_mse,
        mlp_gelu_label_smoothing,
        mlp_class_weights,
        mlp_bce,
        mlp_huber,
        prelu_bilinear,
        cnn_maxpool,
        cnn_depthwise_strided,
        conv_transpose_upsample,
        batchnorm_train,
        batchnorm_eval,
        layernorm,
        groupnorm,
        instancenorm,
        rmsnorm_swiglu,
        dropout_train,
        multihead_attention,
        transformer_encoder,
        tied_gpt_ignored_tokens,
        lstm,
        gru,
        weight_normed,
        weight_normed_by_hook,
        spectral_normed_train,
        frozen_first_layer,
        checkpointed,
        checkpointed_reentrant,
        old_style_function,
        new_style_function,
        embedding_bag,
        shared_layer,
        moving_average_buffer,
        data_dependent_loop,
        numpy_in_forward,
        fourier_mixing,
        two_inputs,
    )
}
