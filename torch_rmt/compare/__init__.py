"""Spectrum beside prediction: distances with their noise floors, outliers, a verdict in words."""

from torch_rmt.compare.comparison import compare as compare
from torch_rmt.compare.comparison import noise_floor as noise_floor
from torch_rmt.compare.distances import kolmogorov as kolmogorov
from torch_rmt.compare.distances import numerical_zero as numerical_zero
from torch_rmt.compare.distances import wasserstein as wasserstein
from torch_rmt.compare.freeness import freeness_gap as freeness_gap
from torch_rmt.compare.report import Distance as Distance
from torch_rmt.compare.report import Outlier as Outlier
from torch_rmt.compare.report import Report as Report
from torch_rmt.compare.report import density_curve as density_curve
