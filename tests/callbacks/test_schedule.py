from __future__ import annotations

import contextlib
import itertools
import time

import pytest

from torch_rmt.callbacks import logarithmic_then_regular, regular
from torch_rmt.callbacks.budget import Budget


def test_points_are_logarithmic_then_regular() -> None:
    due = [step for step in range(10_001) if logarithmic_then_regular(step)]
    assert due[0] == 0
    doubling = [step for step in due if 0 < step < 500]
    assert all(later == 2 * earlier for earlier, later in itertools.pairwise(doubling))
    assert [step for step in due if step >= 500] == list(range(500, 10_001, 500))


def test_number_of_points_grows_slowly() -> None:
    assert sum(map(logarithmic_then_regular, range(400))) <= 8


@pytest.mark.parametrize("every", [1, 7])
def test_regular(every: int) -> None:
    assert [step for step in range(50) if regular(every)(step)] == list(range(0, 50, every))


def test_regular_refuses_zero() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        regular(0)


def test_budget_grants_the_larger_of_seconds_and_fraction() -> None:
    budget = Budget(seconds=2.0, fraction=0.1, spent=1.5, elapsed_before=100.0)
    assert budget.affords(8.0)
    assert not budget.affords(9.0)
    short = Budget(seconds=2.0, fraction=0.1, spent=1.5, elapsed_before=1.0)
    assert short.affords(0.5)
    assert not short.affords(0.6)


def test_budget_keeps_a_reserve_and_lets_the_cheap_go_on() -> None:
    costs = {"dear": 3.0, "cheap": 0.1}
    budget = Budget(seconds=10.0, fraction=0.0, spent=sum(costs.values()))  # each has been measured once
    taken: list[str] = []
    while len(taken) < 100:
        fits = [name for name, cost in costs.items() if budget.affords(cost, reserve=sum(costs.values()))]
        if not fits:
            break
        budget.spent += sum(costs[name] for name in fits)
        taken += fits
    assert taken.count("dear") == 0  # it would leave the cheap one nothing
    assert taken.count("cheap") > 20
    for cost in costs.values():
        assert budget.affords(cost)
        budget.spent += cost
    assert budget.spent <= 10.0


def test_budget_charges_also_what_fails() -> None:
    budget = Budget(seconds=1.0, fraction=0.0)
    with contextlib.suppress(KeyError), budget.charged():
        time.sleep(0.02)
        raise KeyError
    assert 0.02 <= budget.spent < 0.5


@pytest.mark.parametrize(("seconds", "fraction"), [(-1.0, 0.1), (1.0, -0.1), (1.0, 1.5)])
def test_budget_refuses_nonsense(seconds: float, fraction: float) -> None:
    with pytest.raises(ValueError, match="max_"):
        Budget(seconds, fraction)
