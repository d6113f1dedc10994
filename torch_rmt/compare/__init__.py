"""Spectrum beside prediction: distances with their noise floors, outliers, a verdict in words."""

from torch_rmt.compare.report import Distance as Distance
from torch_rmt.compare.report import Outlier as Outlier
from torch_rmt.compare.report import Report as Report
from torch_rmt.compare.report import density_curve as density_curve
