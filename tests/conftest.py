"""Every annotation of torch_rmt is checked at run time while the tests run."""

from __future__ import annotations

import pytest
from jaxtyping import install_import_hook

import tests.run_time_types  # noqa: F401 - the hook looks it up by name

_hook = install_import_hook("torch_rmt", "tests.run_time_types.checked")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One thread each: the suite runs in two worker processes on two cores."""
    import torch

    torch.set_num_threads(1)
