"""Where TensorBoard enters the Spectra tab: it loads `torch_rmt/tensorboard_plugin` without importing `torch_rmt`.

`torch_rmt` imports PyTorch, which the tab has no use for: every start of `tensorboard`, for whatever logs, would wait
two seconds for it, and would fail where PyTorch does.
"""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

_found = find_spec("torch_rmt")  # of a top-level package: finds it, runs nothing of it
if _found is None or _found.origin is None:
    raise ImportError("the Spectra tab is a part of torch_rmt, which is not there: pip install torch-rmt")
_spec = spec_from_file_location(
    "torch_rmt_tensorboard_plugin", Path(_found.origin).parent / "tensorboard_plugin" / "plugin.py"
)
assert _spec is not None
assert _spec.loader is not None
_plugin = module_from_spec(_spec)
sys.modules[_spec.name] = _plugin
_spec.loader.exec_module(_plugin)

SpectraLoader = _plugin.SpectraLoader
