"""Theory: from an architecture to the spectra that random matrix theory predicts for it. No torch in here."""

from torch_rmt.theory.activation import Activation as Activation
from torch_rmt.theory.activation import activation_names as activation_names
from torch_rmt.theory.activation import as_activation as as_activation
from torch_rmt.theory.activation import leaky_relu as leaky_relu
from torch_rmt.theory.architecture import Architecture as Architecture
from torch_rmt.theory.architecture import Layer as Layer
from torch_rmt.theory.gaussian import gaussian_expectation as gaussian_expectation
from torch_rmt.theory.prediction import Prediction as Prediction
from torch_rmt.theory.finite_width import gradient_norm_law as gradient_norm_law
from torch_rmt.theory.fisher import fisher_spectrum as fisher_spectrum
from torch_rmt.theory.fisher import linear_fisher_density as linear_fisher_density
from torch_rmt.theory.fisher_law import FisherLaw as FisherLaw
from torch_rmt.theory.free_levy import FreeLevy as FreeLevy
from torch_rmt.theory.gradient_norm import GradientNormLaw as GradientNormLaw
from torch_rmt.theory.gram import gram_law as gram_law
from torch_rmt.theory.gram import gram_spectrum as gram_spectrum
from torch_rmt.theory.gram import nonlinear_moments as nonlinear_moments
from torch_rmt.theory.gram_law import SampleCovarianceLaw as SampleCovarianceLaw
from torch_rmt.theory.hessian import critical_energy as critical_energy
from torch_rmt.theory.hessian import critical_energy_numerical as critical_energy_numerical
from torch_rmt.theory.hessian import gauss_newton_part as gauss_newton_part
from torch_rmt.theory.hessian import hessian_law as hessian_law
from torch_rmt.theory.hessian import hessian_spectrum as hessian_spectrum
from torch_rmt.theory.hessian import residual_part as residual_part
from torch_rmt.theory.spin_glass import SphericalSpinGlass as SphericalSpinGlass
