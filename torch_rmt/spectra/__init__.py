"""LinearOperator -> Spectrum: dense, Lanczos and stochastic estimators, each with its standard error."""

from torch_rmt.operators.arithmetic import DenseOperator as DenseOperator
from torch_rmt.spectra.affordable import affordable_spectrum as affordable_spectrum
from torch_rmt.spectra.block_lanczos import block_gauss_rule as block_gauss_rule
from torch_rmt.spectra.block_lanczos import block_lanczos as block_lanczos
from torch_rmt.spectra.block_slq import BlockSLQ as BlockSLQ
from torch_rmt.spectra.exact import exact as exact
from torch_rmt.spectra.exact import to_dense as to_dense
from torch_rmt.spectra.extremes import ExtremeEigenvalues as ExtremeEigenvalues
from torch_rmt.spectra.extremes import top_eigenvalues as top_eigenvalues
from torch_rmt.spectra.golub_kahan import golub_kahan as golub_kahan
from torch_rmt.spectra.gram import Complement as Complement
from torch_rmt.spectra.gram import Gram as Gram
from torch_rmt.spectra.kpm import KPM as KPM
from torch_rmt.spectra.lanczos import lanczos as lanczos
from torch_rmt.spectra.slq import SLQ as SLQ
from torch_rmt.spectra.slq import spectrum_within as spectrum_within
from torch_rmt.spectra.spectrum import Spectrum as Spectrum
from torch_rmt.spectra.traces import diagonal as diagonal
from torch_rmt.spectra.traces import hutch_plus_plus as hutch_plus_plus
from torch_rmt.spectra.traces import hutchinson as hutchinson
from torch_rmt.spectra.traces import mixed_moment as mixed_moment
from torch_rmt.spectra.traces import trace as trace
from torch_rmt.spectra.traces import xtrace as xtrace
