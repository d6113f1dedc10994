"""LinearOperator -> Spectrum: dense, Lanczos and stochastic estimators, each with its standard error."""

from torch_rmt.spectra.dense import DenseOperator as DenseOperator
from torch_rmt.spectra.exact import exact as exact
from torch_rmt.spectra.exact import to_dense as to_dense
from torch_rmt.spectra.gram import Gram as Gram
from torch_rmt.spectra.slq import SLQ as SLQ
from torch_rmt.spectra.spectrum import Spectrum as Spectrum
