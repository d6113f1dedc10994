"""The tables of instances that the law tests run over: add one row to add a thing.

One section a package, in the order of the house.
"""

from __future__ import annotations

# --- measures: laws -------------------------------------------------------------------------------------------------
# Laws in closed form, and convolutions as functions that make them.
from tests.measures.table import CONVOLUTIONS as CONVOLUTIONS
from tests.measures.table import LAWS as LAWS

# --- theory: activations, predictions -------------------------------------------------------------------------------
from torch_rmt.theory import activation_names

#: Every activation that has a name.
ACTIVATIONS = activation_names()
#: (activation, sigma_w, sigma_b) near criticality, one of each kind: smooth, kinked, half-stable, linear.
NETWORKS = (
    ("tanh", 1.2, 0.15),
    ("relu", 2**0.5, 0.0),
    ("hard_tanh", 1.2, 0.2),
    ("gelu", 1.408211, 0.415839),
    ("leaky_relu", 1.4, 0.0),
    (None, 1.0, 0.0),
)

# Every law of a network, the network or matrix it is about, and the rate at which the two meet.
# --- operators: module kinds ----------------------------------------------------------------------------------------
# One function a kind, each returning (module, inputs, targets, loss); they are in tests/operators/module_kinds.py.
from tests.operators.module_kinds import MODULE_KINDS as MODULE_KINDS  # noqa: E402

# --- spectra: estimators --------------------------------------------------------------------------------------------
# Matrices with a prescribed spectrum, and estimators that must be unbiased and calibrated on them.
from tests.spectra.prescribed import ESTIMATORS as ESTIMATORS  # noqa: E402
from tests.spectra.prescribed import MATRIX_SPECTRA as MATRIX_SPECTRA  # noqa: E402
from tests.theory.drawn_matrices import PREDICTIONS as PREDICTIONS  # noqa: E402

# --- callbacks ------------------------------------------------------------------------------------------------------
# Every callback that measures; all take the settings of SpectralCallback.
from torch_rmt.callbacks import CurvatureSpectrum, FreenessGap, JacobianSpectrum, SpectralMonitor  # noqa: E402

CALLBACKS = {cls.__name__: cls for cls in (SpectralMonitor, JacobianSpectrum, CurvatureSpectrum, FreenessGap)}
