"""torch_rmt: spectra of real networks beside the laws that random matrix theory predicts for them.

Three uses: a Lightning callback (`torch_rmt.callbacks.SpectralMonitor`), an initialisation helper
(`torch_rmt.critical_init_`) and one call for a plain loop (`torch_rmt.diagnose`).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent


class _CallbacksFinder(importlib.abc.MetaPathFinder):
    """Finds `torch_rmt.callbacks` beside the package in a checkout whose symlink git could not create."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch_rmt.callbacks":
            return None
        folder = _HERE.parent / "callbacks"
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


# A wheel holds the folder, a checkout on a system with symlinks holds the link; only a checkout without
# symlinks has neither, and there `pyproject.toml` stands beside the package.
if not (_HERE / "callbacks").is_dir() and (_HERE.parent / "pyproject.toml").is_file():
    sys.meta_path.append(_CallbacksFinder())

# Eager, since `describe` and `diagnose` are modules too, and the functions must be what `torch_rmt.describe` names.
from torch_rmt.describe import describe  # noqa: E402
from torch_rmt.diagnose import Diagnosis, diagnose  # noqa: E402
from torch_rmt.init import InitReport, critical_init_  # noqa: E402
from torch_rmt.learning_rate import LearningRateReport, suggest_lr  # noqa: E402

__all__ = [
    "Diagnosis",
    "InitReport",
    "LearningRateReport",
    "__version__",
    "critical_init_",
    "describe",
    "diagnose",
    "suggest_lr",
]
