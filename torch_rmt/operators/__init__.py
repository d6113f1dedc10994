"""A module and a batch as linear operators."""

from torch_rmt.operators.adapters import from_curvlinops, from_scipy, to_scipy
from torch_rmt.operators.arithmetic import Dense, Scaled, Transposed, dense
from torch_rmt.operators.base import Combination, LinearOperator
from torch_rmt.operators.blocks import layer_blocks
from torch_rmt.operators.closure import ClosureHessian, adam_scale
from torch_rmt.operators.curvature import Curvature, GaussNewton, Hessian
from torch_rmt.operators.distributed import AllReduced, unsharded
from torch_rmt.operators.dual import DualGram, dual_gram, output_factors
from torch_rmt.operators.engines import EngineError
from torch_rmt.operators.fisher import Fisher, GradientCovariance
from torch_rmt.operators.jacobian import Jacobian
from torch_rmt.operators.kernel import NeuralTangentKernel, conjugate_kernel
from torch_rmt.operators.memory import is_out_of_memory
from torch_rmt.operators.plan import (
    Cost,
    Plan,
    Route,
    column_bytes,
    cost,
    dense_bytes,
    exact_routes,
    keeping_to,
    lanczos_route,
    plan,
    product_bytes,
    room_beside,
)
from torch_rmt.operators.sharded import ShardedGaussNewton, ShardedHessian
from torch_rmt.operators.sweep import (
    LayerNorms,
    activation_slopes,
    input_to_layers,
    layers_to_output,
    partial_jacobian_norms,
    single_layers,
)

__all__ = [
    "AllReduced",
    "ClosureHessian",
    "Combination",
    "Cost",
    "Curvature",
    "Dense",
    "DualGram",
    "EngineError",
    "Fisher",
    "GaussNewton",
    "GradientCovariance",
    "Hessian",
    "Jacobian",
    "LayerNorms",
    "LinearOperator",
    "NeuralTangentKernel",
    "Plan",
    "Route",
    "Scaled",
    "ShardedGaussNewton",
    "ShardedHessian",
    "Transposed",
    "activation_slopes",
    "adam_scale",
    "column_bytes",
    "conjugate_kernel",
    "cost",
    "dense",
    "dense_bytes",
    "dual_gram",
    "exact_routes",
    "from_curvlinops",
    "from_scipy",
    "input_to_layers",
    "is_out_of_memory",
    "keeping_to",
    "lanczos_route",
    "layer_blocks",
    "layers_to_output",
    "output_factors",
    "partial_jacobian_norms",
    "plan",
    "product_bytes",
    "room_beside",
    "single_layers",
    "to_scipy",
    "unsharded",
]
