"""A spectrum within limits of bytes and seconds: exact where that costs less than an estimate, else Lanczos."""

from __future__ import annotations

from dataclasses import replace

import torch

from torch_rmt.operators import (
    Curvature,
    NeuralTangentKernel,
    exact_routes,
    is_out_of_memory,
    lanczos_route,
    product_bytes,
)
from torch_rmt.spectra.exact import along
from torch_rmt.spectra.slq import spectrum_within
from torch_rmt.spectra.spectrum import Spectrum


def affordable_spectrum(
    operator: Curvature | NeuralTangentKernel,
    generator: torch.Generator,
    *,
    products: int = 240,
    max_memory: int | None = None,
    max_seconds: float | None = None,
) -> Spectrum:
    """Spend at most `products` products, `max_seconds` and `max_memory` bytes, the cheapest way first.

    Dense or dual (exact) are taken where they cost no more than that many products, by counted flops and bytes;
    otherwise stochastic Lanczos quadrature with as many products as the seconds allow, as predicted from the time
    of one gradient. `max_memory` bounds graphs and vectors; running out of memory leads to the next smaller way.
    `method` says which way was taken, `notes` what was given up.

    Raises:
        ValueError: not even one product fits the seconds, or not even one probe the bytes.

    >>> from torch_rmt.operators import GaussNewton
    >>> batch = torch.randn(4, 400), torch.randn(4, 1)
    >>> G = GaussNewton(torch.nn.Linear(400, 1), torch.nn.functional.mse_loss, batch)
    >>> affordable_spectrum(G, torch.Generator().manual_seed(0)).method.startswith("exact, dual")
    True
    """
    lanczos = lanczos_route(operator, products)
    cheaper = tuple(route for route in exact_routes(operator) if route.work <= lanczos.work)
    refused: tuple[str, ...] = ()
    if cheaper:
        try:
            return along(cheaper, operator, max_memory, max_seconds)
        except ValueError as problem:
            if "no exact spectrum" not in str(problem):
                raise
            refused = (str(problem).split(": take fewer")[0],)
    budget = products
    if max_seconds is not None and lanczos.seconds > max_seconds:
        budget = int(products * max_seconds / lanczos.seconds)
        if budget < 1:
            raise ValueError(
                f"one product takes {lanczos.seconds / products:.3g} s and {max_seconds:.3g} s are allowed; use fewer "
                "samples, or fewer parameters (params=...)"
            )
        refused += (f"{budget} of {products} products: {max_seconds:.3g} s allow no more",)
    budget = min(budget, operator.shape[0] - 1) or 1
    room, smallest = max_memory, product_bytes(operator, 8)
    while True:
        try:
            found = spectrum_within(operator, generator, matvecs=budget, max_memory=room)
        except (RuntimeError, MemoryError) as problem:
            if not is_out_of_memory(problem):
                raise
            used = room or smallest + 2 * budget * operator.shape[0] * operator.dtype.itemsize
            if used // 2 < smallest:
                raise
            problem.__traceback__ = None
            room = used // 2
            refused += (f"out of memory: planned again for {room} bytes",)
        else:
            notes = dict.fromkeys((*found.notes, *operator.notes, *refused))
            return replace(found, method=f"{found.method} ({lanczos})", notes=tuple(notes))
