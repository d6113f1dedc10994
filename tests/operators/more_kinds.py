"""More real module kinds, small and in float64: each function returns (module, inputs, targets, loss)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.operators.module_kinds import Calls, Case, NewCube


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _squares(module: nn.Module, inputs: Any, *shape: int) -> Case:
    return module.double(), inputs, _x(*shape), F.mse_loss


def _classes(module: nn.Module, inputs: Any, samples: int, classes: int) -> Case:
    return module.double(), inputs, torch.randint(0, classes, (samples,)), F.cross_entropy


def _attention(need_weights: bool, batch_first: bool) -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        y, weights = m.attn(x, x, x, need_weights=need_weights)
        y = y if batch_first else y.transpose(0, 1)
        return m.head(y.mean(1)) if weights is None else m.head(y.mean(1)) + weights.mean((1, 2))[:, None]

    net = Calls(forward, attn=nn.MultiheadAttention(4, 2, batch_first=batch_first), head=nn.Linear(4, 2))
    return _classes(net, _x(3, 3, 4), 3, 2)


def _encoder(training: bool, norm_first: bool) -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 5, activation="gelu", batch_first=True, norm_first=norm_first)
    net = Calls(lambda m, x: m.head(m.layer(x).mean(1)), layer=layer, head=nn.Linear(4, 2))
    return _classes(net.train(training), _x(3, 2, 4), 3, 2)


def decoder_layer() -> Case:
    layer = nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    net = Calls(lambda m, x, y: m.head(m.layer(x, y, tgt_is_causal=False)[:, 0]), layer=layer, head=nn.Linear(4, 2))
    return _classes(net, (_x(3, 2, 4), _x(3, 3, 4)), 3, 2)


def causal_masked_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    net = Calls(
        lambda m, x: m.head(m.layer(x, src_mask=mask, is_causal=True)[:, -1]), layer=layer, head=nn.Linear(4, 2)
    )
    return _classes(net.eval(), _x(3, 3, 4), 3, 2)


def causal_attention_with_dropout() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        return m.head(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3).mean(1))

    return _classes(Calls(forward, qkv=nn.Linear(4, 12), head=nn.Linear(4, 2)), _x(3, 3, 4), 3, 2)


def glu() -> Case:
    return _squares(nn.Sequential(nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 2)), _x(5, 3), 5, 2)


def instance_norm_with_statistics() -> Case:
    norm = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
    net = nn.Sequential(nn.Conv2d(1, 2, 2), norm, nn.SiLU(), nn.Flatten(), nn.Linear(8, 2))
    return _squares(net.train(), _x(3, 1, 3, 3), 3, 2)


def batch_norm_of_one_image() -> Case:
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    return _squares(net.train(), _x(1, 1, 3, 3), 1, 2)


def batch_norm_without_statistics() -> Case:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 2))
    return _squares(net.eval(), _x(5, 3), 5, 2)


def bilinear() -> Case:
    net = Calls(lambda m, x, y: torch.tanh(m.bi(x, y)), bi=nn.Bilinear(2, 3, 2))
    return _squares(net, (_x(4, 2), _x(4, 3)), 4, 2)


def embedding_bag_sum_with_weights() -> Case:
    net = Calls(
        lambda m, x, w: m.head(m.bag(x, per_sample_weights=w)),
        bag=nn.EmbeddingBag(5, 3, mode="sum"),
        head=nn.Linear(3, 2),
    )
    return _squares(net, (torch.randint(0, 5, (4, 3)), _x(4, 3)), 4, 2)


def embedding_with_padding() -> Case:
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(6, 2))
    return _squares(net, torch.tensor([[0, 1], [2, 0], [3, 3], [4, 1]]), 4, 2)


def _recurrent(cls: Callable[..., nn.Module], **options: Any) -> Case:
    rnn = cls(2, 2, batch_first=True, **options)
    with torch.no_grad():
        width = rnn(torch.zeros(1, 1, 2))[0].shape[-1]
    net = Calls(lambda m, x: m.head(m.rnn(x)[0].mean(1)), rnn=rnn, head=nn.Linear(width, 2))
    return _classes(net, _x(3, 3, 2), 3, 2)


def lstm_cell_loop() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 3)
        for t in range(x.shape[1]):
            h, c = m.cell(x[:, t], (h, c))
        return m.head(h)

    return _squares(Calls(forward, cell=nn.LSTMCell(2, 3), head=nn.Linear(3, 2)), _x(3, 3, 2), 3, 2)


def packed_gru() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2, 1]), batch_first=True)
        return m.head(m.rnn(packed)[1][-1])

    return _squares(Calls(forward, rnn=nn.GRU(2, 3, batch_first=True), head=nn.Linear(3, 2)), _x(3, 3, 2), 3, 2)


def conv_transpose_1d_and_3d() -> Case:
    net = Calls(
        lambda m, x: m.b(torch.tanh(m.a(x)).unsqueeze(1).unsqueeze(1)).flatten(1)[:, :3],
        a=nn.ConvTranspose1d(2, 2, 2, stride=2, output_padding=1),
        b=nn.ConvTranspose3d(1, 1, 2, dilation=2),
    )
    return _squares(net, _x(3, 2, 2), 3, 3)


def pixel_shuffle_and_adaptive_pools() -> Case:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.PixelShuffle(2), nn.Tanh(), nn.AdaptiveAvgPool2d(3), nn.Conv2d(1, 2, 1),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2, 2),
    )  # fmt: skip
    return _squares(net, _x(3, 1, 3, 3), 3, 2)


def padded_and_odd_convolutions() -> Case:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding="same", padding_mode="circular"), nn.Softsign(), nn.LPPool2d(2, 2),
        nn.LocalResponseNorm(2), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    return _squares(net, _x(3, 1, 4, 4), 3, 2)


def weight_normed_convolution() -> Case:
    net = nn.Sequential(
        weight_norm(nn.Conv1d(1, 2, 2), dim=0), nn.Tanh(), nn.Flatten(), weight_norm(nn.Linear(6, 2), dim=1)
    )
    return _squares(net, _x(3, 1, 4), 3, 2)


def spectral_normed_eval() -> Case:
    return _squares(nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).eval(), _x(5, 3), 5, 2)


def orthogonal_parametrised() -> Case:
    net = nn.Sequential(orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"), nn.Tanh(), nn.Linear(3, 2))
    return _squares(net, _x(5, 3), 5, 2)


def checkpointed_with_dropout() -> Case:
    net = Calls(
        lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)),
        body=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.4)),
        head=nn.Linear(4, 2),
    )
    return _squares(net.train(), _x(5, 3), 5, 2)


def checkpointed_in_segments() -> Case:
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh())
    net = Calls(
        lambda m, x: m.head(checkpoint_sequential(m.body, 2, x, use_reentrant=False)), body=body, head=nn.Linear(3, 2)
    )
    return _squares(net, _x(5, 3), 5, 2)


def tied_across_transposes() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(m.a(x)), m.a.weight.T)

    return _squares(Calls(forward, a=nn.Linear(3, 4)), _x(5, 3), 5, 3)


def partly_frozen() -> Case:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return _squares(net, _x(5, 3), 5, 2)


class SetupCube(NewCube):
    """With `setup_context`, without a rule for vmap."""

    generate_vmap_rule = False


class VmapCube(SetupCube):
    """With its own rules for vmap and forward mode."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, Any]:
        return VmapCube.apply(x), in_dims[0]

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * t


class OnceCube(torch.autograd.Function):
    """Differentiable once only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def _function(cls: Any) -> Case:
    return _squares(Calls(lambda m, x: m.b(cls.apply(m.a(x))), a=nn.Linear(2, 3), b=nn.Linear(3, 2)), _x(4, 2), 4, 2)


def branch_on_data() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        return m.b(h) if float(h.mean()) > -2.0 and bool((x.sum() < 1e9).item()) else m.b(-h)

    return _squares(Calls(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), _x(5, 3), 5, 2)


def compiled_whole() -> Case:
    module, *rest = glu()
    return (torch.compile(module), *rest)  # type: ignore[return-value]


def compiled_part() -> Case:
    net = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(3, 4), nn.Tanh())), nn.Linear(4, 2))
    return _squares(net, _x(5, 3), 5, 2)


def views_in_place() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h[:, ::2].mul_(h[:, 1::2].detach().sigmoid())
        h.view(-1)[::3] += 1.0
        h = h.clamp_min_(-3.0).masked_fill_(x[:, :1] > 1.0, 0.5)
        return m.b(torch.tanh_(h))

    return _squares(Calls(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), _x(5, 3), 5, 2)


def input_in_place() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x[:, 0] = 0.0
        return m.b(torch.tanh(m.a(x.sub_(1.0))))

    return _squares(Calls(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), _x(5, 3), 5, 2)


def one_hot_tokens() -> Case:
    net = Calls(
        lambda m, t: m.b(torch.tanh(m.a(F.one_hot(t, 4).double().flatten(1)))), a=nn.Linear(8, 3), b=nn.Linear(3, 2)
    )
    return _squares(net, torch.randint(0, 4, (5, 2)), 5, 2)


def stochastic_depth() -> Case:
    net = Calls(lambda m, x: m.b(x + m.a(x) * (torch.rand(x.shape[0], 1) > 0.5)), a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    return _squares(net.train(), _x(5, 3), 5, 2)


def linear_algebra_inside() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.a.weight @ m.a.weight.T + torch.eye(3, dtype=x.dtype)
        return m.b(torch.linalg.solve(a, torch.tanh(x).T).T + torch.linalg.cholesky(a)[0])

    return _squares(Calls(forward, a=nn.Linear(3, 3, bias=False), b=nn.Linear(3, 2)), _x(5, 3), 5, 2)


def an_unused_parameter() -> Case:
    net = Calls(lambda m, x: m.b(torch.tanh(x)), unused=nn.Linear(2, 2), b=nn.Linear(3, 2))
    return _squares(net, _x(5, 3), 5, 2)


MORE_KINDS: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        decoder_layer, causal_masked_encoder, causal_attention_with_dropout, glu, instance_norm_with_statistics,
        batch_norm_of_one_image, batch_norm_without_statistics, bilinear, embedding_bag_sum_with_weights,
        embedding_with_padding, lstm_cell_loop, packed_gru, conv_transpose_1d_and_3d, pixel_shuffle_and_adaptive_pools,
        padded_and_odd_convolutions, weight_normed_convolution, spectral_normed_eval, orthogonal_parametrised,
        checkpointed_with_dropout, checkpointed_in_segments, tied_across_transposes, partly_frozen, branch_on_data,
        compiled_whole, compiled_part, views_in_place, input_in_place, one_hot_tokens, stochastic_depth,
        linear_algebra_inside, an_unused_parameter,
    )
}  # fmt: skip
MORE_KINDS |= {
    "attention_weights": lambda: _attention(True, True),
    "attention_weights_sequence_first": lambda: _attention(True, False),
    "attention_sequence_first": lambda: _attention(False, False),
    "encoder_eval": lambda: _encoder(False, False),
    "encoder_norm_first_train": lambda: _encoder(True, True),
    "lstm_bidirectional": lambda: _recurrent(nn.LSTM, bidirectional=True),
    "lstm_projected": lambda: _recurrent(nn.LSTM, proj_size=1),
    "gru_two_layers_dropout": lambda: _recurrent(nn.GRU, num_layers=2, dropout=0.3),
    "rnn_relu": lambda: _recurrent(nn.RNN, nonlinearity="relu"),
    "function_setup_context": lambda: _function(SetupCube),
    "function_own_vmap": lambda: _function(VmapCube),
    "function_once_differentiable": lambda: _function(OnceCube),
}
