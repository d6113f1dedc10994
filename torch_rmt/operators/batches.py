"""One batch or many: what the operators average over, right for an uneven last batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torch_rmt.operators.losses import Loss, count_terms
from torch_rmt.operators.pure import PureModel, first_tensor, tree_map


@dataclass(frozen=True)
class Batch:
    """Detached inputs and targets, with their size.

    Fields:
        samples: length of the first dimension of the inputs.
        terms: what a mean loss averages over (samples, or tokens that are not ignored, by class weight if it has any).
    """

    inputs: Any
    targets: Any
    samples: int
    terms: float


def as_pairs(data: Any) -> list[tuple[Any, Any]]:
    """Read `(inputs, targets)` as one batch; a list of pairs or a loader as many. A loader is read once.

    A list of two tensors, as a `DataLoader` yields, is one batch too.
    """
    if isinstance(data, tuple) and len(data) == 2:
        return [(data[0], data[1])]
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            f"the batch is a {type(data).__name__}; pass (inputs, targets), a list of such pairs, or a loader"
        )
    items = list(data)
    if isinstance(data, list) and len(items) == 2 and all(isinstance(item, Tensor) for item in items):
        return [(items[0], items[1])]
    if not items:
        raise ValueError("there is no batch in the list or loader; pass at least one (inputs, targets)")
    for item in items:
        if not (isinstance(item, (tuple, list)) and len(item) == 2):
            raise TypeError(f"a batch must be a pair (inputs, targets), not {type(item).__name__}")
    return [(item[0], item[1]) for item in items]


def read_batches(data: Any, pure: PureModel, loss: Loss) -> list[Batch]:
    """Detach, convert and count.

    Raises:
        TypeError: the data are no pairs.
        ValueError: a batch is empty.
    """
    batches = []
    for inputs, targets in as_pairs(data):
        inputs, targets = pure.prepare(inputs), pure.prepare(targets)
        samples = sample_count(inputs)
        terms = count_terms(loss, targets, samples)
        if terms == 0:
            raise ValueError("every target of the batch is ignored by the loss; pass at least one that counts")
        batches.append(Batch(inputs, targets, samples, terms))
    return batches


def cut(batch: Batch, size: int, loss: Loss) -> list[Batch] | None:
    """Parts of at most `size` samples, or None where the batch cannot be cut or a part has no term.

    Tensors whose first dimension is a multiple of the samples (tokens, say) are cut along it, others (a mask,
    say) are given to every part; whether that is right, the caller must check.
    """
    parts = []
    for start in range(0, batch.samples, size):
        stop = min(start + size, batch.samples)

        def piece(t: Tensor, start: int = start, stop: int = stop) -> Tensor:
            if t.ndim == 0 or t.shape[0] % batch.samples:
                return t
            each = t.shape[0] // batch.samples
            return t[start * each : stop * each]

        if not isinstance(batch.targets, Tensor):
            return None
        inputs, targets = tree_map(piece, batch.inputs), piece(batch.targets)
        terms = count_terms(loss, targets, stop - start)
        if terms == 0:
            return None
        parts.append(Batch(inputs, targets, stop - start, terms))
    return parts


def sample_count(inputs: Any) -> int:
    """Length of the first dimension of the first tensor.

    Raises:
        ValueError: there is no tensor, or it is empty.
    """
    first = first_tensor(inputs)
    if first is None or first.numel() == 0:
        raise ValueError("the batch is empty; pass at least one sample")
    return first.shape[0] if first.ndim else 1
