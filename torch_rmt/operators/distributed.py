"""Several processes: data-parallel products, and models whose parameters are sharded.

Every rank must make the same calls in the same order; log on rank 0, measure on all.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from torch_rmt.operators.base import Like, LinearOperator
from torch_rmt.operators.curvature import Curvature
from torch_rmt.operators.fisher import Fisher, GradientCovariance


class AllReduced(Like):
    """Average of every rank's operator over its own data, each weighted by its number of terms; sum for a summed loss.

    Vectors are taken from rank 0, so that probes drawn with different seeds do no harm, and the result is the
    same on every rank. All ranks must multiply together.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        TypeError: a gradient covariance, which is no average (reduce the empirical Fisher instead).
        ValueError: ranks that differ in the number of parameters.
    """

    symmetric = True
    copies = 1

    def __init__(self, operator: Curvature, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed is not initialised; in one process use the operator itself")
        if isinstance(operator, GradientCovariance):
            raise TypeError("a gradient covariance is not the mean of the ranks'; reduce Fisher(kind='empirical')")
        super().__init__(operator)
        self.local, self.group = operator, group
        self.positive = operator.positive
        own = [float(operator.terms), float(operator.samples), float(operator.shape[0]), float(operator.summed)]
        totals = torch.tensor(own, dtype=torch.float64, device=operator.device)
        dist.all_reduce(totals, group=group)
        ranks = dist.get_world_size(group)
        if float(totals[2]) != ranks * operator.shape[0]:
            raise ValueError(
                f"this rank differentiates by {operator.shape[0]} parameters, the mean over ranks is "
                f"{float(totals[2]) / ranks:g}; give every rank the same model and params"
            )
        if totals[3] and not operator.summed:  # one sample alone does not show that a loss sums
            operator.summed = True
            operator._forget()
        self.weight = 1.0 if operator.summed else operator.terms / float(totals[0])
        if isinstance(operator, Fisher) and operator.kind == "empirical" and not operator.summed:
            # sum_n g_n g_n^T / N with g_n = N (terms_n / terms) * ...: quadratic in the weight, linear in N.
            self.weight *= (operator.terms / operator.samples) * float(totals[1] / totals[0])

    def matmat(self, V: Float[Tensor, "columns k"]) -> Float[Tensor, "columns k"]:
        """Columns `sum_r w_r A_r v`, reduced over the ranks."""
        V = V.detach().clone(memory_format=torch.contiguous_format)
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast(V, source, group=self.group)
        torch.mul(self.local.matmat(V), self.weight, out=V)
        dist.all_reduce(V, group=self.group)
        return V

    def product_bytes(self, columns: int) -> int:
        """The most that it is on any rank, so that all ranks plan alike; to be asked on all together."""
        most = torch.tensor(super().product_bytes(columns), device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return int(most)

    def adjoint(self) -> LinearOperator:
        """Return itself: symmetric."""
        return self


def unsharded(sharded: nn.Module, skeleton: nn.Module) -> nn.Module:
    """Whole copy of a model with sharded parameters (FSDP2), gathered one by one; call on every rank.

    `torch.func` has no strategy for sharded tensors, so the parameters are gathered into a copy of
    `skeleton`, the same architecture before `fully_shard` (`copy.deepcopy(model).to("meta")` in `setup()`
    costs no memory).

    Raises:
        ValueError: the skeleton lacks a parameter or buffer of the model.
    """
    whole = copy.deepcopy(skeleton)
    state: dict[str, Tensor] = {}
    sources = (
        *sharded.named_parameters(remove_duplicate=False),
        *sharded.named_buffers(remove_duplicate=False),
    )
    for name, t in sources:
        full = t.full_tensor() if hasattr(t, "full_tensor") else t
        state[name] = full.detach().clone()
    own = {
        n
        for n, _ in (
            *whole.named_parameters(remove_duplicate=False),
            *whole.named_buffers(remove_duplicate=False),
        )
    }
    if own != set(state):
        raise ValueError(
            f"skeleton and model differ in {sorted(own ^ set(state))[:3]}; make the skeleton from the model "
            "before fully_shard"
        )
    frozen = {n: p.requires_grad for n, p in sharded.named_parameters()}
    # Assigning name by name would break ties (as `.to("meta")` did), so tied names share one tensor again.
    shared: dict[int, str] = {}
    for name, p in sharded.named_parameters(remove_duplicate=False):
        first = shared.setdefault(id(p), name)
        owner, _, leaf = name.rpartition(".")
        head, _, tail = first.rpartition(".")
        if first == name:
            value: nn.Parameter = nn.Parameter(state[name], requires_grad=frozen.get(name, True))
        else:
            value = getattr(whole.get_submodule(head), tail)
        setattr(whole.get_submodule(owner), leaf, value)
    for name, _ in skeleton.named_buffers(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        whole.get_submodule(owner)._buffers[leaf] = state[name]
    modes = {name: m.training for name, m in sharded.named_modules()}
    for name, m in whole.named_modules():
        m.training = modes.get(name, m.training)
    return whole
