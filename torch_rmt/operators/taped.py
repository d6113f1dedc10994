"""Products played from a tape: how a block of vectors is run where the graph is kept."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torch_rmt.operators.memory import is_out_of_memory
from torch_rmt.operators.tape import Tensors, player, record
from torch_rmt.operators.tape_rules import simplified

_ROUNDING = {torch.float64: 1e-10}  # a share of the product's length; elsewhere 1e-3


def taped(one: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    """Apply a product to each vector of a block in turn, from a tape of the walk for the first vector.

    The first result, too, is what the tape plays, so that a product does not depend on what was multiplied before. The
    graph is let go once the tape is there. Where no tape can be made, or it does not play what was recorded, every
    product walks the graph.
    """
    ready: list[Callable[[Tensors], Tensors]] = []
    graph = [one]

    def many(block: Tensors) -> Tensors:
        vectors = [tuple(t[i] for t in block) for i in range(block[0].shape[0])]
        if not ready:
            ready.append(_recorded(graph.pop(), vectors[0]))
        results = [ready[0](v) for v in vectors]
        if len(results) == 1:
            return tuple(t.unsqueeze(0) for t in results[0])
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    return many


def _recorded(one: Callable[[Tensors], Tensors], vectors: Tensors) -> Callable[[Tensors], Tensors]:
    try:
        program, walked = record(one, vectors)
        program = simplified(program)  # lets constants go that were merged
        play = player(program)
        played = play(vectors)
    except (RuntimeError, NotImplementedError, TypeError) as problem:
        if is_out_of_memory(problem):
            raise
        return one
    allowed = _ROUNDING.get(walked[0].dtype, 1e-3)
    gap = torch.stack([(a - b).norm() for a, b in zip(played, walked, strict=True)]).norm()
    size = torch.stack([b.norm() for b in walked]).norm()
    return play if bool(gap <= allowed * size) else one
