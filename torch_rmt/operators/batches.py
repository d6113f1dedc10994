"""One batch or many: what the operators average over, right for an uneven last batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from torch_rmt.operators.losses import Loss, count_terms
from torch_rmt.operators.pure import PureModel
from torch_rmt.operators.trees import first_tensor, part_of


@dataclass(frozen=True)
class Batch:
    """Detached inputs and targets, with their size.

    Fields:
        samples: length of the first dimension of the inputs.
        terms: what a mean loss averages over (samples, or tokens that are read and not ignored, by class weight if it
            has any).
    """

    inputs: Any
    targets: Any
    samples: int
    terms: float


def as_pairs(data: Any, model: nn.Module) -> list[tuple[Any, Any]]:
    """Read `(inputs, targets)` as one batch; a list of pairs or a loader as many. A loader is read once.

    A list of two tensors, as a `DataLoader` yields, is one batch too. So is a mapping with an entry "labels": that is
    the targets, and the model is called with the entries as keywords, "labels" only if its forward has that argument.
    """
    if isinstance(data, Mapping):
        return [labelled(data, model)]
    if isinstance(data, tuple) and len(data) == 2 and not all(isinstance(item, Mapping) for item in data):
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
    pairs = []
    for item in items:
        if isinstance(item, Mapping):
            item = labelled(item, model)
        if not (isinstance(item, (tuple, list)) and len(item) == 2):
            raise TypeError(f"a batch must be a pair (inputs, targets), not {type(item).__name__}")
        pairs.append((item[0], item[1]))
    return pairs


def labelled(batch: Mapping[str, Any], model: nn.Module) -> tuple[dict[str, Any], Any]:
    """Keywords for the model, and the labels; the model gets them too where its forward has that argument.

    Raises:
        TypeError: there are no labels.
    """
    if "labels" not in batch:
        raise TypeError(
            f"the batch is a mapping with {', '.join(map(str, batch))} and without 'labels'; pass (inputs, targets), "
            "in which inputs may be a mapping of keywords for the model"
        )
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    return {key: value for key, value in batch.items() if key != "labels" or takes_labels}, batch["labels"]


def read_batches(data: Any, pure: PureModel, loss: Loss) -> list[Batch]:
    """Detach, convert and count.

    Raises:
        TypeError: the data are no pairs.
        ValueError: a batch is empty.
    """
    batches = []
    for inputs, targets in as_pairs(data, pure.module):
        inputs, targets = pure.prepare(inputs), pure.prepare(targets)
        samples = sample_count(inputs)
        terms = count_terms(loss, targets, samples)
        if terms == 0:
            raise ValueError("every target of the batch is ignored by the loss; pass at least one that counts")
        batches.append(Batch(inputs, targets, samples, terms))
    return batches


def counted_again(batches: list[Batch], loss: Loss, unread: int) -> list[Batch]:
    """The batches with the terms of a loss that does not read so many of each row's first targets."""
    return [replace(b, terms=count_terms(loss, b.targets, b.samples, unread)) for b in batches]


def cut(batch: Batch, size: int, loss: Loss, unread: int = 0) -> list[Batch] | None:
    """Parts of at most `size` samples, as `part_of`; None where a part has no term."""
    parts = []
    for start in range(0, batch.samples, size):
        part = slice(start, min(start + size, batch.samples))
        inputs, targets = (part_of(tree, batch.samples, part) for tree in (batch.inputs, batch.targets))
        terms = count_terms(loss, targets, part.stop - start, unread)
        if terms == 0:
            return None
        parts.append(Batch(inputs, targets, part.stop - start, terms))
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
