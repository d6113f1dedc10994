"""How many bytes graphs take, and how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from torch_rmt.operators.pure import PureModel

# Measured as live bytes on MLPs, a CNN and a GPT, Hessian and Gauss-Newton, all ways of running blocks; in units of
# what one forward pass saves: a kept second-order graph takes 3.5 to 4, a product and its proof 3 more at most, and
# each further vector of a block that vmap runs 1.3 to 2.1.
KEPT_OVER_FORWARD = 4
_PRODUCT_OVER_FORWARD = 3
_BLOCK_OVER_FORWARD = 2.2
_FREE_IF_UNKNOWN = 4 * 2**30
_NO_LIMIT = 2**62  # control groups of the first version write a number near 2^63 where there is no limit


@dataclass(frozen=True)
class Footprint:
    """Bytes that products with a module take.

    Fields:
        kept: saved by the forward passes of all batches whose graphs are held at the same time.
        largest: saved by that of the largest batch.
        vector: one vector over the parameters.
        vmapped: whether the vectors of a block run at the same time.
        copies: of parameters, where a vector is not as long as all of them.
    """

    kept: int
    largest: int
    vector: int
    vmapped: bool
    copies: int = 0

    def product(self, columns: int, width: int = 1) -> int:
        """Bytes of a product with so many columns, `width` at a time; the vectors given are not counted."""
        block = _BLOCK_OVER_FORWARD * self.largest * (width - 1) if self.vmapped else 0
        graphs = KEPT_OVER_FORWARD * self.kept + _PRODUCT_OVER_FORWARD * self.largest + self.copies
        return int(graphs + block + (2 * columns + 2 * width + 12) * self.vector)

    def width(self, columns: int, max_memory: int) -> int:
        """How many of so many columns may be multiplied at a time; 0 if not even one."""
        spare = max_memory - self.product(columns)
        each = 2 * self.vector + (_BLOCK_OVER_FORWARD * self.largest if self.vmapped else 0)
        return 0 if spare < 0 else 1 + int(spare / max(1.0, each))


def saved_bytes(pure: PureModel, inputs: object) -> int:
    """Bytes that one forward pass keeps for its backward pass, parameters not counted."""
    leaves = tuple(p.detach().requires_grad_() for p in pure.params)
    with pure.guarded():
        return saved_during(lambda: pure(leaves, inputs), leaves)


def saved_during(run: Callable[[], object], own: Sequence[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, without those of some tensors."""
    # By weak references: what is let go here may lie again where something else lay, and is another tensor.
    seen: dict[StorageWeakRef, int] = {}

    nothing = torch.empty(0)  # a hook that gave the tensor back would tie the graph to itself for ever

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        seen[StorageWeakRef(storage)] = storage.nbytes()  # type: ignore[no-untyped-call]
        return nothing

    others = {StorageWeakRef(t.untyped_storage()) for t in own}  # type: ignore[no-untyped-call]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(size for storage, size in seen.items() if storage not in others)


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an exception says that memory ran out: CUDA's, Python's, or the CPU allocator's RuntimeError.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), is_out_of_memory(ValueError())
        (True, False)
    """
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = str(problem).lower()
    return isinstance(problem, RuntimeError) and any(
        said in words for said in ("out of memory", "can't allocate memory", "not enough memory")
    )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device; on a CPU within the limits of the process and of its container."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    known = [free for free in (_free_of_machine(), _free_of_address_space(), free_of_container()) if free is not None]
    return max(0, min(known, default=_FREE_IF_UNKNOWN))


def _free_of_machine() -> int | None:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return None


def _free_of_address_space() -> int | None:
    """Under `ulimit -v`."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        return limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return None


def free_of_container(root: Path = Path("/")) -> int | None:
    """Below the memory limits of this process's control groups, which the kernel enforces by killing it; None for none.

    What the page cache holds and has not used lately counts as free.
    """
    found = []
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        mount, most, used, idle = ("", "memory.max", "memory.current", "inactive_file")
        if controllers:
            mount, most, used, idle = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        place = PurePosixPath(path.lstrip("/"))
        for group in (place, *place.parents):  # a group is bound by those around it, too
            folder = root / "sys/fs/cgroup" / mount / group
            try:
                limit, held = (folder / most).read_text().strip(), int((folder / used).read_text())
                entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit != "max" and int(limit) < _NO_LIMIT:
                found.append(int(limit) - held + int(entries.get(idle, 0)))
    return min(found, default=None)


def graph_bytes(pure: PureModel, inputs: object) -> int:
    """Bytes of the graph that is kept for products with one batch, estimated from one forward pass."""
    return KEPT_OVER_FORWARD * saved_bytes(pure, inputs)
