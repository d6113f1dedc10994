"""Products played from a tape: how a block of vectors is run where the graph is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from torch_rmt.operators.memory import is_out_of_memory
from torch_rmt.operators.tape import Tensors, length, record
from torch_rmt.operators.tape_player import player
from torch_rmt.operators.tape_rules import Pool, simplified

_ROUNDING = {torch.float64: 1e-10}  # a share of the product's length; elsewhere 1e-3
_LINE = 64  # bytes of a cache line: equal places in it give equal last bits


def taped(one: Callable[[Tensors], Tensors], pool: Pool | None = None) -> Callable[[Tensors], Tensors]:
    """Apply a product to each vector of a block in turn, from a tape of the walk for the first vector.

    The first result, too, is what the tape plays, so that a product does not depend on what was multiplied before. The
    graph is let go once the tape is there. Where no tape can be made, or it does not play what was recorded, every
    product walks the graph. The result is memory of its own, and lies row by row in one piece, see `rows_of`.
    Tapes of one graph may share a `pool` of constants.
    """
    ready: list[Callable[[Sequence[Tensors]], Tensors]] = []
    graph = [one]

    def many(block: Tensors) -> Tensors:
        vectors = [tuple(t[i] for t in block) for i in range(block[0].shape[0])]
        if not ready:
            ready.append(_recorded(graph[0], vectors[0], pool))
            graph.clear()
        return ready[0](vectors)

    return many


def rows_of(pieces: Tensors) -> torch.Tensor:
    """A block of parameter-shaped tensors as rows `(k, n)`; not copied where they lie so already."""
    rows = [p.reshape(p.shape[0], -1) for p in pieces]
    end, step = rows[0].data_ptr(), rows[0].stride(0)
    for r in rows:
        if (r.data_ptr(), r.stride(0)) != (end, step):
            return torch.cat(rows, dim=1)
        end += r.shape[1] * r.itemsize
    return rows[0].as_strided((len(rows[0]), sum(r.shape[1] for r in rows)), (step, 1))


def _recorded(
    one: Callable[[Tensors], Tensors], vectors: Tensors, pool: Pool | None
) -> Callable[[Sequence[Tensors]], Tensors]:
    walking = _walking(one)
    try:
        program, walked = record(one, vectors)
        program = simplified(program, pool)  # lets constants go that were merged
        play = player(program)
        if len({(t.dtype, t.device) for t in walked}) > 1:
            return walking
        playing = _playing(play, walked)
        played = playing([vectors])
    except (RuntimeError, NotImplementedError, TypeError) as problem:
        if is_out_of_memory(problem):
            raise
        return walking
    allowed = _ROUNDING.get(walked[0].dtype, 1e-3)
    gap = length(tuple(a[0] - b for a, b in zip(played, walked, strict=True)))
    return playing if bool(gap <= allowed * length(walked)) else walking


def _walking(one: Callable[[Tensors], Tensors]) -> Callable[[Sequence[Tensors]], Tensors]:
    def run(vectors: Sequence[Tensors]) -> Tensors:
        results = [one(v) for v in vectors]
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    return run


def _playing(play: Callable[..., Tensors], like: Tensors) -> Callable[[Sequence[Tensors]], Tensors]:
    """Results in rows of one piece of memory, each row at the start of a cache line."""
    shapes, sizes = [t.shape for t in like], [t.numel() for t in like]
    empty, line = like[0].new_empty(0), max(1, _LINE // like[0].itemsize)
    width = -(-sum(sizes) // line) * line

    def run(vectors: Sequence[Tensors]) -> Tensors:
        rows = empty.new_empty(len(vectors), width)[:, : sum(sizes)]
        pieces = tuple(p.view(len(vectors), *s) for p, s in zip(torch.split(rows, sizes, dim=1), shapes, strict=True))
        for i, v in enumerate(vectors):
            play(v, tuple(p[i] for p in pieces))
        return pieces

    return run
