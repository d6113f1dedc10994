"""Probability measures on the real line, their transforms, and free convolutions."""

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.classical import Arcsine, MarchenkoPastur, Semicircle, free_poisson
from torch_rmt.measures.composite import Affine, Mixture, affine, dilate
from torch_rmt.measures.convolution import FreeConvolution, FreeProduct, FreeSum
from torch_rmt.measures.cumulants import (
    free_cumulants,
    moments_from_free_cumulants,
    moments_from_rectangular_cumulants,
    rectangular_cumulants,
)
from torch_rmt.measures.discrete import Bernoulli, Discrete, PointMass, empirical
from torch_rmt.measures.elementary import QuarterCircle, Uniform
from torch_rmt.measures.free import free_add, free_compress, free_mul, free_power, rectangular_product
from torch_rmt.measures.fuss_catalan import FussCatalan
from torch_rmt.measures.jacobi import KestenMcKay, Wachter, jacobi
from torch_rmt.measures.pushforward import GaussianPushforward
from torch_rmt.measures.rectangular import RectangularSum, rectangular_sum
from torch_rmt.measures.subordination import ConvergenceError, Subordination
from torch_rmt.measures.transforms import (
    eta_transform,
    inverse_m,
    inverse_stieltjes,
    m_transform,
    r_transform,
    s_transform,
)

__all__ = [
    "Affine",
    "Arcsine",
    "Atom",
    "Bernoulli",
    "ConvergenceError",
    "Discrete",
    "FreeConvolution",
    "FreeProduct",
    "FreeSum",
    "FussCatalan",
    "GaussianPushforward",
    "Interval",
    "KestenMcKay",
    "MarchenkoPastur",
    "Mixture",
    "PointMass",
    "QuarterCircle",
    "RectangularSum",
    "Semicircle",
    "SpectralMeasure",
    "Subordination",
    "Uniform",
    "Wachter",
    "affine",
    "dilate",
    "empirical",
    "eta_transform",
    "free_add",
    "free_compress",
    "free_cumulants",
    "free_mul",
    "free_poisson",
    "free_power",
    "inverse_m",
    "inverse_stieltjes",
    "jacobi",
    "m_transform",
    "moments_from_free_cumulants",
    "moments_from_rectangular_cumulants",
    "r_transform",
    "rectangular_cumulants",
    "rectangular_product",
    "rectangular_sum",
    "s_transform",
]
