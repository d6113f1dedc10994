"""A module and a batch as linear operators."""

from torch_rmt.operators.arithmetic import Combination, Dense, Scaled, Transposed, dense
from torch_rmt.operators.base import LinearOperator
from torch_rmt.operators.curvature import Curvature, Fisher, GaussNewton, GradientCovariance, Hessian
from torch_rmt.operators.jacobian import Jacobian
from torch_rmt.operators.kernel import NeuralTangentKernel, conjugate_kernel
from torch_rmt.operators.ladder import EngineError

__all__ = [
    "Combination",
    "Curvature",
    "Dense",
    "EngineError",
    "Fisher",
    "GaussNewton",
    "GradientCovariance",
    "Hessian",
    "Jacobian",
    "LinearOperator",
    "NeuralTangentKernel",
    "Scaled",
    "Transposed",
    "conjugate_kernel",
    "dense",
]
