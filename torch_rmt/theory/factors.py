"""From an architecture to the factors of the master equation: closed-form terms, implicit kinds, atoms, moments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from torch_rmt.measures import Discrete, PointMass
from torch_rmt.measures.base import SpectralMeasure
from torch_rmt.theory.activation import Activation
from torch_rmt.theory.architecture import Architecture, Layer, Residual
from torch_rmt.theory.atomic_chain import AtomicChain
from torch_rmt.theory.block import Block, sharing
from torch_rmt.theory.chain import Chain
from torch_rmt.theory.chain_kind import Kind
from torch_rmt.theory.chain_parts import Term
from torch_rmt.theory.equal_layers import EqualLayers
from torch_rmt.theory.far_slopes import far_slope_law
from torch_rmt.theory.jacobian_law import Solver
from torch_rmt.theory.like_blocks import gathered
from torch_rmt.theory.like_layers import representative_moments
from torch_rmt.theory.moments import is_scale_invariant, slope_moment
from torch_rmt.theory.projection_block import ProjectionBlock
from torch_rmt.theory.propagation import BlockSignal, Signal, sum_gain, weight_gain
from torch_rmt.theory.residual import reads_a_part
from torch_rmt.theory.series import moments_from_s, multiply, power, s_series
from torch_rmt.theory.shortcut import Shortcut
from torch_rmt.theory.slope_law import NodeLaw, slope_law

_MOMENTS = 9
_SAME = 1e-6  # relative distance below which two atoms of a measured law are one
_FEW_ATOMS = 64  # of all laws together: beyond it the gaps are many and narrow, and `Chain` sees a smooth law
_WIDEST = 200.0  # natural logs that the spectrum of a product of atoms may span


@dataclass
class Factors:
    """The factors of J^T J, collected layer by layer; u = scale * M throughout.

    Fields:
        log_scale: sum of the logs of all constant factors, so that what is left has mean-one laws.
        terms: closed-form factors (a + b M)^count, as a dict (a, b) -> count.
        kinds: implicit factors (law, scale) -> count, laws shared by identity.
        rank: dimension of the image over n_0.
        constants: (dimension over n_0, log of the constant in units of the scale) of the subspaces on which every
            factor so far is one constant; none once a Gaussian layer has mixed everything.
        plain: True while all layers are square.
        atomic: the laws so far with their counts, scaled to mean one, while all factors are atoms in the space of the
            input; None once one is not.
    """

    log_scale: float = 0.0
    terms: dict[tuple[float, float], float] = field(default_factory=dict)
    kinds: dict[tuple[int, float], tuple[NodeLaw, float]] = field(default_factory=dict)
    rank: float = 1.0
    constants: list[tuple[float, float]] = field(default_factory=lambda: [(1.0, 0.0)])
    gaussians: int = 0
    plain: bool = True
    atomic: list[tuple[NodeLaw, float]] | None = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def add_term(self, a: float, b: float, count: float = 1.0) -> None:
        """Multiply z by (a + b M)^count, a constant part taken into the scale."""
        self.log_scale += count * float(np.log(a))
        key = (1.0, float(np.round(b / a, 14)))
        self.terms[key] = self.terms.get(key, 0.0) + count
        if self.terms[key] == 0.0:
            del self.terms[key]

    def add_law(self, law: NodeLaw, scale: float, count: float = 1.0) -> None:
        """Multiply by `count` factors with the law of s in a space of dimension n_0 / scale; scaled to mean one."""
        at_zero = law.mass_at(0.0)
        self.rank = min(self.rank, (1.0 - at_zero) / scale)
        mean = law.moment(1)
        if self.atomic is not None and not law.ranges and scale == 1.0:
            self.atomic.append((law.scaled(1.0 / mean), count))
        else:
            self.atomic = None
        # Subspaces in general position meet in what their dimensions leave over.
        self._narrow(
            (kept - count * (1.0 - mass) / scale, log + count * float(np.log(place / mean)))
            for kept, log in self.constants
            for place, mass in law.atoms
            if place > 0
        )
        if not law.ranges and len(law.atoms) - (at_zero > 0) == 1:
            # {0, s}: w = s (u + p) / u, in closed form.
            p = 1.0 - at_zero
            location = law.atoms[-1][0]
            self.log_scale += count * float(np.log(location))
            if at_zero > 0:
                self.add_term(p, scale, count)
                self.add_term(1.0, scale, -count)
            return
        self.log_scale += count * float(np.log(mean))
        key = (id(law), scale)
        _, known = self.kinds.get(key, (law, 0.0))
        self.kinds[key] = (law, known + count)

    def add_weights(self, layer: Layer, first: int) -> None:
        """Multiply by the factor of W."""
        before, after = first / layer.n_in, first / layer.n_out
        self.rank = min(self.rank, layer.n_out / first)
        self.plain &= layer.n_in == layer.n_out
        if isinstance(layer.ensemble, PointMass) and layer.ensemble.location > 0:
            # A multiple of the identity mixes nothing: a chain that starts at a pre-activation stays one of equals.
            self.log_scale += float(np.log(layer.ensemble.location))
            return
        if isinstance(layer.ensemble, SpectralMeasure):
            self.plain = False
            self.add_law(measured_law(layer.ensemble), before)
            return
        if layer.sigma_w == 0.0:
            raise ValueError(f"layer {layer.name!r} has sigma_w = 0: its Jacobian is zero.")
        self.log_scale += 2.0 * float(np.log(layer.sigma_w))
        if layer.ensemble == "gaussian" or layer.n_out != layer.n_in:
            self.atomic = None
        if layer.ensemble == "gaussian":
            self.log_scale += float(np.log(layer.n_out / layer.n_in))
            self.add_term(1.0, after)
            self.constants = []
            self.gaussians += 1
        elif layer.n_out > layer.n_in:
            self.log_scale += float(np.log(layer.n_out / layer.n_in))
        elif layer.n_out < layer.n_in:
            self.add_term(layer.n_out / layer.n_in, before)
            self.add_term(1.0, before, -1.0)
            # The constant is in units of the scale, of which the projection's mean n_out / n_in is a part.
            lost, rise = (layer.n_in - layer.n_out) / first, float(np.log(layer.n_out / layer.n_in))
            self._narrow((kept - lost, log - rise) for kept, log in self.constants)

    def add_block(self, block: Block) -> None:
        """Multiply by residual blocks; scaled to mean one."""
        self.atomic, self.plain = None, False
        self.log_scale += block.count * float(np.log(block.mean))
        self.rank = min(self.rank, block.rank / block.scale)
        at_one = block.count * float(np.log(block.shortcut.value / block.mean))
        lost = block.count * (1.0 - block.at_shortcut) / block.scale
        self._narrow((kept - lost, log + at_one) for kept, log in self.constants)
        self.blocks.append(block)

    def chain(self) -> Chain:
        """The solver for factors of any sort."""
        kinds = tuple(
            Kind(law.scaled(1.0 / law.moment(1)), scale, count) for (_, scale), (law, count) in self.kinds.items()
        )
        terms = tuple(Term(a, b, count) for (a, b), count in self.terms.items())
        return Chain(terms, (*kinds, *self.blocks), self.rank)

    def _narrow(self, constants: Iterable[tuple[float, float]]) -> None:
        self.constants = [(kept, log) for kept, log in constants if kept > 1e-12]

    def single_law(self) -> tuple[list[float], list[float]] | None:
        """(log locations, masses) where the whole law is atoms: no mixing factor, or one Discrete law alone."""
        if self.blocks:
            return None
        if self.gaussians or self.kinds:
            laws = list(self.kinds.values())
            alone = not self.terms and len(laws) == 1 and laws[0][1] == 1 and not laws[0][0].ranges
            if self.gaussians or not alone or next(iter(self.kinds))[1] != 1.0:
                return None
            law = laws[0][0]
            mean = law.moment(1)
            return (
                [float(np.log(s / mean)) + self.log_scale if s > 0 else -np.inf for s, _ in law.atoms],
                [mass for _, mass in law.atoms],
            )
        if len(self.constants) == 1 and abs(self.constants[0][0] - self.rank) < 1e-12:
            # One projection, or none: the rest of the space is the null space.
            value = self.log_scale + self.constants[0][1]
            if self.rank > 1.0 - 1e-12:
                return [value], [1.0]
            return [float("-inf"), value], [1.0 - self.rank, self.rank]
        return None

    def log_atoms(self) -> tuple[tuple[float, float], ...]:
        """(log location in units of the scale, mass) of the atoms.

        Zero: what the narrowest place of the chain loses. Elsewhere: subspaces in general position meet in what their
        dimensions leave over (Haar weights only).
        """
        atoms: list[tuple[float, float]] = []
        if self.rank < 1.0 - 1e-14:
            atoms.append((float("-inf"), 1.0 - self.rank))
        return (*atoms, *((log, kept) for kept, log in self.constants))

    def moments(self) -> Float[np.ndarray, " orders"]:
        """Moments 0 to 8 in units of the scale, from the product of S-transforms."""
        orders = _MOMENTS - 1
        s = np.zeros(orders)
        s[0] = 1.0
        for (a, b), count in self.terms.items():
            base = np.zeros(orders)
            base[:2] = a, b
            s = multiply(s, power(base, -count))
        for (_, scale), (law, count) in self.kinds.items():
            mean = law.moment(1)
            one = s_series([law.moment(k) / mean**k for k in range(_MOMENTS)]) * scale ** np.arange(orders)
            s = multiply(s, power(one, count))
        for block in self.blocks:
            one = block.s_series() * block.mean * block.scale ** np.arange(orders)
            s = multiply(s, power(one, block.count))
        return moments_from_s(s)

    def atomic_chain(self) -> AtomicChain | None:
        """The solver of square layers with a few atoms each, None for any other chain."""
        laws = [(law, count) for law, count in self.atomic or [] if len(law.atoms) > 1]
        with np.errstate(divide="ignore"):
            decades = sum(count * float(np.ptp(np.log([s for s, _ in law.atoms if s > 0]))) for law, count in laws)
        if not (self.kinds and laws) or sum(len(law.atoms) for law, _ in laws) > _FEW_ATOMS or decades > _WIDEST:
            return None
        return AtomicChain.of(
            [(Discrete([s for s, _ in law.atoms], [mass for _, mass in law.atoms]), count) for law, count in laws]
        )

    def solver(self) -> Solver:
        """The solver for these factors: without choice of branch for equal layers, by continuation for others."""
        if len(self.kinds) == 1 and self.plain:
            ((law, count),) = self.kinds.values()
            equal = self.gaussians in (0, count) and set(self.terms) <= {(1.0, 1.0)}
            if equal and self.terms.get((1.0, 1.0), 0.0) == self.gaussians:
                return EqualLayers(law.scaled(1.0 / law.moment(1)), count, self.gaussians > 0)
        return self.atomic_chain() or self.chain()


def collect(architecture: Architecture, signals: tuple[Signal, ...]) -> Factors:
    """The factors of an architecture whose layers see the given signals.

    Layers of one activation and width whose q differ are gathered into the few kinds of `representative_moments`;
    the constant factor, hence the mean, keeps the value that every layer's own q gives.
    """
    # One orthogonal layer has w = z, on the cut itself: twice the nodes.
    return _collected(architecture.layers, signals, order=28 if len(architecture.layers) == 1 else 14)


def _collected(
    layers: tuple[Layer | Residual, ...], signals: tuple[Signal, ...], order: int, *, on_axis: bool = False
) -> Factors:
    """Factors of a chain; `on_axis` for one that will mostly be asked on the real axis, off its laws, as branches."""
    factors, first = Factors(), layers[0].n_in
    alike: dict[tuple[int, float, float], tuple[Activation | None, list[float]]] = {}
    blocks: dict[float, list[tuple[Residual, BlockSignal]]] = {}
    for layer, signal in zip(layers, signals, strict=True):
        if isinstance(layer, Layer):
            factors.add_weights(layer, first)
        elif isinstance(signal, BlockSignal):
            blocks.setdefault(first / layer.n_in, []).append((layer, signal))
        factors.log_scale -= float(np.log(signal.divisor))
        if layer.activation is not None or layer.dropout > 0:
            key = id(layer.activation), first / layer.n_out, float(layer.dropout)
            alike.setdefault(key, (layer.activation, []))[1].append(signal.q)
    for scale, pairs in blocks.items():
        for layer, signal, count in gathered(pairs):
            block = sharing(residual_block(layer, signal), factors.blocks).over(scale, count)
            factors.add_block(block)
            factors.log_scale -= count * float(np.log(block.mean))
        factors.log_scale += sum(
            float(np.log(sum_gain(layer, signal) * layer.n_out / layer.n_in)) for layer, signal in pairs
        )
    for (_, scale, dropout), (activation, qs) in alike.items():
        if activation is None:
            factors.add_law(slope_law(None, 1.0).thinned(dropout), scale, len(qs))
            continue
        piecewise_linear = activation.slopes() is not None  # atoms, in closed form: nothing to gather
        if is_scale_invariant(activation):
            qs = [1.0] * len(qs)  # the slopes do not depend on q
        rule = _counted(qs) if piecewise_linear else representative_moments(tuple(qs))
        for q, count in rule:
            law = (far_slope_law if on_axis else slope_law)(activation, q, order=order).thinned(dropout)
            factors.add_law(law, scale, count)
            if not piecewise_linear:
                factors.log_scale -= count * float(np.log(slope_moment(activation, q)))
        if not piecewise_linear:
            factors.log_scale += sum(float(np.log(slope_moment(activation, q))) for q in qs)
    return factors


def residual_block(block: Residual, signal: BlockSignal) -> Block:
    """The part that a residual block adds to a chain of its own width."""
    branch = _collected(block.branch, signal.branch, order=14, on_axis=True)
    kind = Block if block.n_in == block.n_out else ProjectionBlock
    return kind(branch.chain(), branch.log_scale, _shortcut(block, signal.shortcut), 1.0, 1.0, branch.moments())


def _shortcut(block: Residual, signals: tuple[Signal, ...]) -> Shortcut:
    ratio = block.n_in / block.n_out
    scale, gaussian = 1.0 / ratio, False
    for layer, signal in zip(block.shortcut, signals, strict=True):
        scale *= weight_gain(layer) / signal.divisor
        gaussian = gaussian or layer.ensemble == "gaussian"
    seen = block.shortcut[0].n_out / block.n_in if reads_a_part(block) else 1.0
    return Shortcut(scale, gaussian, ratio, seen)


def _counted(moments: list[float]) -> tuple[tuple[float, float], ...]:
    """Each value with its number of occurrences."""
    return tuple((q, float(count)) for q, count in Counter(moments).items())


def measured_law(measure: SpectralMeasure) -> NodeLaw:
    """Nodes and weights of a law of W^T W; a continuous one by Gauss-Legendre in its quantiles.

    Raises:
        ValueError: mass below zero, or no mass above it.
    """
    if isinstance(measure, Discrete) or not measure.support():
        atoms = measure.atoms()
        nodes, weights = np.array([x for x, _ in atoms]), np.array([m for _, m in atoms])
    else:
        unit, unit_weights = np.polynomial.legendre.leggauss(8)
        edges = 0.5 - 0.5 * np.cos(np.pi * np.linspace(0, 1, 65))
        half = np.diff(edges)[:, None] / 2
        levels = (edges[:-1, None] + half * (1 + unit)).ravel()
        nodes, weights = measure.quantile(levels), (half * unit_weights).ravel()
    tiny = 1e-13 * np.abs(nodes).max()
    if nodes.min() < -tiny or nodes.max() <= 0:
        raise ValueError("a law of W^T W lives on [0, inf) and not on 0 alone: square the singular values.")
    nodes = np.where(np.abs(nodes) <= tiny, 0.0, nodes)
    order = np.argsort(nodes, kind="stable")
    nodes, weights = nodes[order], weights[order]
    # Singular values that float32 could not tell apart are one atom, at their mean: gaps between them are rounding.
    which = np.zeros(len(nodes), dtype=np.intp)
    start = nodes[0]
    for i in range(1, len(nodes)):
        apart = nodes[i] - start > _SAME * nodes[i]
        which[i] = which[i - 1] + apart
        start = nodes[i] if apart else start
    masses = np.bincount(which, weights)
    places = np.bincount(which, weights * nodes) / np.where(masses > 0, masses, 1.0)
    places, masses = places[masses > 0], masses[masses > 0] / masses.sum()
    pairs = tuple((float(s), float(m)) for s, m in zip(places, masses, strict=True))
    return NodeLaw(places, masses, pairs, ())
