"""A module and a batch as linear operators."""

from torch_rmt.operators.base import LinearOperator
from torch_rmt.operators.curvature import Fisher, GaussNewton, Hessian
from torch_rmt.operators.jacobian import Jacobian, NeuralTangentKernel

__all__ = ["Fisher", "GaussNewton", "Hessian", "Jacobian", "LinearOperator", "NeuralTangentKernel"]
