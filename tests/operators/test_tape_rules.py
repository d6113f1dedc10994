"""Shortened tapes of drawn programs: whatever linear walk is recorded, its shorter tape plays the same."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torch_rmt.operators.tape import record
from torch_rmt.operators.tape_memory import IN_PLACE
from torch_rmt.operators.tape_player import player
from torch_rmt.operators.tape_rules import simplified

Walk = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
N = 4


def _drawn(seed: int) -> Walk:
    """A linear function of two matrices by a dozen operations on values made before, some of them made twice."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    constants = [torch.randn(N, N, generator=generator, dtype=torch.float64) for _ in range(3)]
    constants.append(constants[0].t())  # the same memory, read the other way round
    constants.append(constants[0].clone())  # the same numbers elsewhere
    constants.append(constants[0].clone().index_fill_(0, torch.tensor([1]), 0.5))  # and nearly the same
    slope = torch.randn(N, N, generator=generator, dtype=torch.float64)
    logs = slope.log_softmax(1)
    aten = torch.ops.aten
    steps: list[tuple[str, int, int, int, float]] = []
    kinds = [
        "mm",
        "mm left",
        "mul",
        "scalar",
        "div",
        "quotient",
        "neg",
        "add",
        "sub",
        "t",
        "transpose",
        "view",
        "slope",
    ]
    kinds += ["bmm", "add", "sub", "mul", "scalar", "sum", "zero", "grown", "tall", "spread", "row", "over row"]
    kinds += ["softmax", "bias", "weighed bias", "sum flat", "sum both"]
    for place in range(draw.randint(6, 14)):
        values = place + 2
        near = draw.randrange(max(0, values - 3), values)
        alpha = draw.choice([1, 1, 2.0, -0.5])
        steps.append((draw.choice(kinds), near, draw.randrange(values), draw.randrange(len(constants)), alpha))
    steps.insert(2, steps[1])
    outputs = [draw.randrange(len(steps) // 2, len(steps) + 2) for _ in range(2)] + [len(steps) + 1]

    def walk(vectors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = list(vectors)
        for kind, i, j, c, alpha in steps:
            a, b, constant = values[i], values[j], constants[c]
            values.append(
                {
                    "mm": lambda a=a, k=constant: a @ k,
                    "mm left": lambda a=a, k=constant: k @ a,
                    "mul": lambda a=a, k=constant: k * a,
                    "scalar": lambda a=a, s=alpha: a * (3.0 * s),
                    "div": lambda a=a: a / 7.0,
                    "quotient": lambda a=a, k=constant: a / (2.0 + k * k),
                    "neg": lambda a=a: -a,
                    "add": lambda a=a, b=b, s=alpha: torch.add(a, b, alpha=s),
                    "sub": lambda a=a, b=b, s=alpha: torch.sub(a, b, alpha=s),
                    "t": lambda a=a: a.t(),
                    "transpose": lambda a=a: a.reshape(2, 2, N).transpose(0, 1).transpose(-2, 2).reshape(N, N),
                    "view": lambda a=a: a.reshape(2, 2 * N).reshape(2 * N, 2).reshape(N, N),
                    "slope": lambda a=a: aten.tanh_backward(a, slope.tanh()),
                    "bmm": lambda a=a, k=constant: torch.bmm(a.reshape(2, 2, N), k.expand(2, N, N)).reshape(N, N),
                    "sum": lambda a=a: a + a.sum(0),
                    "grown": lambda a=a: a.sum(0) + torch.zeros(N, N, dtype=torch.float64),
                    "tall": lambda a=a, k=constant: (a.reshape(2, 2 * N).reshape(2 * N, 2) @ k[:2, :2]).reshape(N, N),
                    "spread": lambda a=a: a.t() + a.sum(0, keepdim=True).t(),
                    "row": lambda a=a, k=constant: a + a.sum(0, keepdim=True) @ k,
                    "over row": lambda a=a, k=constant: a.sum(0, keepdim=True) @ k + a,
                    "softmax": lambda a=a: aten._log_softmax_backward_data(a, logs, -1, torch.float64),
                    "bias": lambda a=a, k=constant: torch.addmm(a.sum(0).reshape(1, N).expand(N, N), a, k),
                    "weighed bias": lambda a=a, k=constant: torch.addmm(a.sum(0).expand(N, N), a, k, beta=2.0),
                    "sum flat": lambda a=a: a + a.sum(0, keepdim=True).reshape(N),
                    "sum both": lambda a=a: a + a.sum([0, 1], keepdim=True).reshape(1),
                    "zero": lambda a=a: a + torch.zeros(N, N, dtype=torch.float64),
                }[kind]()
            )
        return tuple(values[o] for o in outputs)

    return walk


@pytest.mark.parametrize("seed", range(3))
def test_a_shorter_tape_of_any_walk_plays_the_walk(seed: int) -> None:
    shorter = 0
    for case in range(25):
        walk = _drawn(1000 * seed + case)
        drawn = [torch.randn(3, 2, N, N, generator=torch.Generator().manual_seed(case), dtype=torch.float64)][0]
        with torch.no_grad():
            program, _ = record(walk, tuple(drawn[0]))
            short = simplified(program)
            shorter += len(program.steps) - len(short.steps)
            for vectors in drawn[1:]:
                given = tuple(v.clone() for v in vectors)
                for played, true in zip(player(short)(given), walk(tuple(vectors)), strict=True):
                    torch.testing.assert_close(played, true, rtol=1e-11, atol=1e-11)
                assert all(torch.equal(a, b) for a, b in zip(given, vectors, strict=True))
    assert shorter > 25


def test_what_is_nearly_the_same_is_kept_apart() -> None:
    """Constants in the same memory or with the same ends, the same sum with another factor, transposes of vectors."""
    a = torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = a.clone().index_fill_(0, torch.tensor([1]), 0.5)

    def walk(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        sums = tuple(torch.add(v[0], v[1], alpha=alpha) for alpha in (1, 2.0, -0.5))
        return (v[0] @ a, v[0] @ a.t(), v[0] @ near, *sums, v[0].t() + v[1].sum(0).t())

    first, second = torch.randn(2, 2, N, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        play = player(simplified(record(walk, tuple(first))[0]))
        for played, true in zip(play(tuple(second)), walk(tuple(second)), strict=True):
            torch.testing.assert_close(played, true)


def test_only_what_nobody_looks_at_is_written_over() -> None:
    """A product is the place of its last reader; not where a transpose of it, or it itself, is read after that."""
    a = torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def free(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        made = v[0] @ a
        return made.sum(0), made * a

    def looked_at(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        made = v[0] @ a
        look = made.t()
        return made * a, look @ a

    def read_later(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        made = v[0] @ a
        first = made * a
        return first, made @ a

    def given(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        made = v[0] @ a
        return made * a, made

    first, second = torch.randn(2, 2, N, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for walk, over in ((free, 1), (looked_at, 0), (read_later, 0), (given, 0)):
        with torch.no_grad():
            short = simplified(record(walk, tuple(first))[0])
            assert sum(step.function in IN_PLACE for step in short.steps) == over, walk.__name__
            for played, true in zip(player(short)(tuple(second)), walk(tuple(second)), strict=True):
                torch.testing.assert_close(played, true)
