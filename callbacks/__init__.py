"""Lightning callbacks: `SpectralMonitor`, `JacobianSpectrum`, `CurvatureSpectrum`, `FreenessGap`,
`CriticalInit`.

The folder stands at the top of the repository and is shipped as `torch_rmt.callbacks`; it answers to no
other name.
"""

if __name__ != "torch_rmt.callbacks":
    raise ImportError(
        f"this folder is torch_rmt.callbacks, but it was imported as {__name__!r}; write "
        "'from torch_rmt.callbacks import SpectralMonitor'."
    )

from torch_rmt.callbacks.critical import CriticalInit
from torch_rmt.callbacks.monitor import CurvatureSpectrum, FreenessGap, JacobianSpectrum, SpectralMonitor
from torch_rmt.callbacks.schedule import logarithmic_then_regular, regular

__all__ = [
    "CriticalInit",
    "CurvatureSpectrum",
    "FreenessGap",
    "JacobianSpectrum",
    "SpectralMonitor",
    "logarithmic_then_regular",
    "regular",
]
