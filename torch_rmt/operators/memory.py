"""How many bytes graphs take, and how many there are."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from torch_rmt.operators.pure import PureModel

# Kept second-order graph over saved activations of one forward pass: measured 3.5 to 4 on an MLP and a GPT.
KEPT_OVER_FORWARD = 4


def saved_bytes(pure: PureModel, inputs: object) -> int:
    """Bytes that one forward pass keeps for its backward pass, parameters not counted."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    leaves = tuple(p.detach().requires_grad_() for p in pure.params)
    own = {p.untyped_storage().data_ptr() for p in leaves}
    with pure.guarded(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pure(leaves, inputs)
    return sum(size for pointer, size in seen.items() if pointer not in own)


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
    """Memory that can still be had on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def graph_bytes(pure: PureModel, inputs: object) -> int:
    """Bytes of the graph that is kept for products with one batch, estimated from one forward pass."""
    return KEPT_OVER_FORWARD * saved_bytes(pure, inputs)


def room_for_graphs(pure: PureModel, max_memory: int | None) -> int:
    """Bytes left for graphs: `max_memory` less three vectors, or half of what is free."""
    if max_memory is None:
        return free_bytes(pure.device) // 2
    return max(0, max_memory - 3 * pure.n_params * pure.dtype.itemsize)
