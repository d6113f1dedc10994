"""Probability measures on the real line, their transforms, and free convolutions."""

from torch_rmt.measures.base import Atom, Interval, SpectralMeasure
from torch_rmt.measures.classical import Arcsine, MarchenkoPastur, Semicircle, free_poisson
from torch_rmt.measures.composite import Affine, Mixture, affine, dilate
from torch_rmt.measures.discrete import Bernoulli, Discrete, PointMass, empirical
from torch_rmt.measures.fuss_catalan import FussCatalan

__all__ = [
    "Affine",
    "Arcsine",
    "Atom",
    "Bernoulli",
    "Discrete",
    "FussCatalan",
    "Interval",
    "MarchenkoPastur",
    "Mixture",
    "PointMass",
    "Semicircle",
    "SpectralMeasure",
    "affine",
    "dilate",
    "empirical",
    "free_poisson",
]
