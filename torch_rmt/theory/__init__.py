"""Theory: from an architecture to the spectra that random matrix theory predicts for it. No torch in here."""

from torch_rmt.theory.activation import Activation as Activation
from torch_rmt.theory.activation import activation_names as activation_names
from torch_rmt.theory.activation import as_activation as as_activation
from torch_rmt.theory.activation import leaky_relu as leaky_relu
from torch_rmt.theory.architecture import Architecture as Architecture
from torch_rmt.theory.architecture import Layer as Layer
from torch_rmt.theory.gaussian import gaussian_expectation as gaussian_expectation
from torch_rmt.theory.prediction import Prediction as Prediction
