"""The activations that have a name, in closed form: value, derivative, kinks."""

from __future__ import annotations

import numpy as np
from jaxtyping import Inexact
from scipy.special import erf, erfc, expit, ndtr

from torch_rmt.theory.activation import Activation, Array, leaky_relu
from torch_rmt.theory.closed_forms import ErrorFunction, GaussianLinear, Sine

Points = Inexact[np.ndarray, "..."]

# Klambauer et al. 2017, as torch.nn.SELU.
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
# torch.nn.GELU(approximate="tanh"), Hendrycks and Gimpel 2016.
_GELU_C, _GELU_A = np.sqrt(2 / np.pi), 0.044715


# Derivatives take complex arrays too, analytic in a strip around each smooth piece: the Jacobian law moves its
# quadrature off the real axis (see slope_law.py). Comparisons then look at the real part.


def _sigmoid(h: Points) -> Points:
    if not np.iscomplexobj(h):
        return np.asarray(expit(h))
    left = np.real(h) < 0
    e = np.exp(np.where(left, h, -h))  # never overflows
    return np.asarray(np.where(left, e, 1.0) / (1 + e))


def _normal_cdf(h: Points) -> Points:
    return np.asarray(0.5 * erfc(-h / np.sqrt(2)) if np.iscomplexobj(h) else ndtr(h))


def _gauss(h: Points) -> Points:
    return np.asarray(np.exp(-(h**2) / 2) / np.sqrt(2 * np.pi))


def _sech2(h: Points) -> Points:
    # 1 - tanh^2 loses every digit for |h| > 18.
    e = np.exp(-2 * (np.where(np.real(h) < 0, -h, h) if np.iscomplexobj(h) else np.abs(h)))
    return np.asarray(4 * e / (1 + e) ** 2)


def _silu_derivative(h: Points) -> Points:
    return np.asarray(_sigmoid(h) * (1 + h * _sigmoid(-h)))


def _gelu_tanh(h: Array) -> Array:
    return np.asarray(h * expit(2 * _GELU_C * (h + _GELU_A * h**3)))


def _gelu_tanh_derivative(h: Points) -> Points:
    inner = 2 * _GELU_C * (h + _GELU_A * h**3)
    s = _sigmoid(inner)
    return np.asarray(s + h * s * _sigmoid(-inner) * 2 * _GELU_C * (1 + 3 * _GELU_A * h**2))


def _mish_derivative(h: Points) -> Points:
    # tanh(log(1 + e^h)) = (n - 1) / (n + 1) with n = (1 + e^h)^2, written for either sign of h.
    e = np.exp(np.where(np.real(h) < 0, h, -h))
    t = np.where(np.real(h) < 0, e * (e + 2) / (e * (e + 2) + 2), (1 + 2 * e) / (1 + 2 * e + 2 * e * e))
    return np.asarray(t + h * _sigmoid(h) * (1 - t) * (1 + t))


def _elu(h: Array, alpha: float = 1.0, scale: float = 1.0) -> Array:
    return np.asarray(scale * np.where(h > 0, h, alpha * np.expm1(np.minimum(h, 0))))


def _elu_derivative(h: Points, alpha: float = 1.0, scale: float = 1.0) -> Points:
    return np.asarray(scale * np.where(np.real(h) > 0, 1.0, alpha * np.exp(np.where(np.real(h) > 0, 0, h))))


def _softsign_derivative(h: Points) -> Points:
    return np.asarray(1 / (1 + np.where(np.real(h) < 0, -h, h)) ** 2)


def _hard_swish_derivative(h: Points) -> Points:
    return np.asarray(np.where(np.real(h) <= -3, 0.0, np.where(np.real(h) >= 3, 1.0, h / 3 + 0.5)))


def _relu_squared_derivative(h: Points) -> Points:
    return np.asarray(np.where(np.real(h) > 0, 2 * h, 0.0))


_TABLE = (
    Activation("linear", lambda h: np.asarray(h, dtype=np.float64), lambda h: np.ones_like(h, dtype=np.float64)),
    Activation("relu", lambda h: np.maximum(h, 0.0), lambda h: np.where(h > 0, 1.0, 0.0), (0.0,)),
    Activation("leaky_relu", leaky_relu(0.01).value, leaky_relu(0.01).derivative, (0.0,)),
    Activation("tanh", np.tanh, _sech2),
    Activation("erf", lambda h: erf(h), lambda h: 2 / np.sqrt(np.pi) * np.exp(-(h**2)), closed=ErrorFunction(1.0)),
    Activation(
        "scaled_erf",
        lambda h: erf(np.sqrt(np.pi) / 2 * h),
        lambda h: np.exp(-np.pi / 4 * h**2),
        closed=ErrorFunction(float(np.sqrt(np.pi) / 2)),
    ),
    Activation(
        "hard_tanh",
        lambda h: np.clip(h, -1.0, 1.0),
        lambda h: np.where((h > -1) & (h < 1), 1.0, 0.0),
        (-1.0, 1.0),
    ),
    Activation("gelu", lambda h: h * ndtr(h), lambda h: _normal_cdf(h) + h * _gauss(h), closed=GaussianLinear()),
    Activation("gelu_tanh", _gelu_tanh, _gelu_tanh_derivative),
    Activation("silu", lambda h: h * expit(h), _silu_derivative),
    Activation("mish", lambda h: h * np.tanh(np.logaddexp(0, h)), _mish_derivative),
    Activation("elu", _elu, _elu_derivative, (0.0,)),
    Activation(
        "selu",
        lambda h: _elu(h, _SELU_ALPHA, _SELU_SCALE),
        lambda h: _elu_derivative(h, _SELU_ALPHA, _SELU_SCALE),
        (0.0,),
    ),
    Activation("sigmoid", lambda h: expit(h), lambda h: _sigmoid(h) * _sigmoid(-h)),
    Activation("log_sigmoid", lambda h: -np.logaddexp(0, -h), lambda h: _sigmoid(-h)),
    Activation("softplus", lambda h: np.logaddexp(0, h), _sigmoid),
    Activation("softsign", lambda h: h / (1 + np.abs(h)), _softsign_derivative, (0.0,)),
    Activation("sin", np.sin, np.cos, closed=Sine()),
    Activation("relu6", lambda h: np.clip(h, 0.0, 6.0), lambda h: np.where((h > 0) & (h < 6), 1.0, 0.0), (0.0, 6.0)),
    Activation(
        "hard_sigmoid",
        lambda h: np.clip(h / 6 + 0.5, 0.0, 1.0),
        lambda h: np.where((h > -3) & (h < 3), 1 / 6, 0.0),
        (-3.0, 3.0),
    ),
    Activation(
        "hard_swish",
        lambda h: h * np.clip(h / 6 + 0.5, 0.0, 1.0),
        _hard_swish_derivative,
        (-3.0, 3.0),
    ),
    Activation("relu_squared", lambda h: np.maximum(h, 0.0) ** 2, _relu_squared_derivative, (0.0,)),
    Activation("abs", np.abs, np.sign, (0.0,)),
    Activation("tanh_shrink", lambda h: h - np.tanh(h), lambda h: np.tanh(h) ** 2),
)

ACTIVATIONS = {activation.name: activation for activation in _TABLE}
_ALIASES = {"identity": "linear", "swish": "silu", "gelutanh": "gelu_tanh", "sine": "sin"} | {
    name.replace("_", ""): name for name in ACTIVATIONS
}


def canonical(name: str) -> str:
    """Reduce "Leaky ReLU", "LeakyReLU" and "leaky-relu" to "leaky_relu"."""
    bare = name.lower().replace("_", "").replace("-", "").replace(" ", "")
    return _ALIASES.get(bare, name)
