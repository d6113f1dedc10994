"""Steps of a tape read in order and written anew: what all rules are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch_rmt.operators.tape import Program, Step, Value, mapped


class Rewriter:
    """Steps that are read in order and written anew; `same` says which value stands for another."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps: list[Step] = []
        self.same: dict[int, Any] = {}
        self.maker: dict[int, Step] = {}
        self.count = program.uses()
        self.next = 1 + max([program.inputs - 1, *(r for s in program.steps for r in s.results)])

    def current(self, a: Any) -> Any:
        """What stands for an argument now."""
        return self.same.get(a.index, a) if isinstance(a, Value) else a

    def renamed(self, step: Step) -> Step:
        """The step with what stands for its arguments now."""
        if not self.same:
            return step
        kwargs = {key: mapped(a, self.current) for key, a in step.kwargs.items()}
        return replace(step, args=mapped(step.args, self.current), kwargs=kwargs)

    def keep(self, step: Step) -> None:
        """Write a step down."""
        self.steps.append(step)
        for r in step.results:
            self.maker[r] = step

    def made_by(self, a: Any) -> Step | None:
        """The step that made a value; None for vectors and constants."""
        return self.maker.get(a.index) if isinstance(a, Value) else None

    def once(self, a: Any) -> bool:
        """Whether a value has one reader only."""
        return isinstance(a, Value) and self.count.get(a.index, 0) == 1

    def fresh(self) -> int:
        """The number of a new value."""
        self.next += 1
        return self.next - 1

    def done(self) -> Program:
        """The program of the steps that were kept."""
        outputs = tuple(self.current(o) for o in self.program.outputs)
        return replace(self.program, steps=tuple(self.steps), outputs=outputs)


def each(program: Program, rule: Callable[[Rewriter, Step], Step | None]) -> Program:
    """Apply a rule to every step in order; it returns the step to keep, or None after naming a substitute."""
    work = Rewriter(program)
    for step in program.steps:
        kept = rule(work, work.renamed(step))
        if kept is not None:
            work.keep(kept)
    return work.done()
