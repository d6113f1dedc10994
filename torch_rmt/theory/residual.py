"""Where the blocks of a residual network are free of each other, and what to say where they are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch_rmt.measures import PointMass
from torch_rmt.theory.architecture import Architecture, Layer, Residual


def every_layer(layers: Sequence[Layer | Residual]) -> Iterator[Layer | Residual]:
    """All layers and blocks, those inside blocks too, each block behind what it holds."""
    for layer in layers:
        if isinstance(layer, Residual):
            yield from every_layer(layer.branch)
            yield from every_layer(layer.shortcut)
        yield layer


def has_blocks(architecture: Architecture) -> bool:
    """Whether a residual block is in the chain."""
    return any(isinstance(layer, Residual) for layer in architecture.layers)


def checked_blocks(layers: Sequence[Layer | Residual]) -> None:
    """Raise where a residual block has no law here.

    Raises:
        ValueError: a branch without random weights; a shortcut that is neither the identity nor one random layer;
            activations on both sides of identity shortcuts.
    """
    for block in layers:
        if not isinstance(block, Residual):
            continue
        name = f"residual block {block.name!r}"
        checked_blocks(block.branch)
        if not any(mixes(layer) for layer in block.branch):
            raise ValueError(f"{name} has no random weights in its branch: x and branch(x) are not free of each other.")
        if any(not isinstance(layer.ensemble, str | PointMass) for layer in block.shortcut):
            raise ValueError(
                f"{name}: a shortcut with a measured law, such as a norm that scales its channels unevenly, "
                "has no law here. Take a stretch without it."
            )
        if any(layer.activation is not None or layer.dropout > 0 for layer in block.shortcut) or (
            sum(mixes(layer) for layer in block.shortcut) > 1 and not reads_a_part(block)
        ):
            raise ValueError(f"{name}: a shortcut is the identity or one linear layer here. Take a stretch without it.")
    facing = _facing_slopes(layers)
    if facing is not None:
        raise ValueError(
            f"the activations before and behind residual block {facing!r} act on the same units: through the identity "
            "shortcut a unit that was on stays on, and the slopes are not free of each other. Take a stretch that "
            "begins behind the one or ends before the other (source=, target=)."
        )


def reads_a_part(block: Residual) -> bool:
    """Whether the shortcut is a projection to fewer dimensions, then a Gaussian layer, as a strided 1x1 convolution."""
    mixing = [layer for layer in block.shortcut if mixes(layer)]
    return (
        len(mixing) == 2
        and mixing[0] is block.shortcut[0]
        and (mixing[0].ensemble, mixing[1].ensemble) == ("orthogonal", "gaussian")
        and mixing[0].n_out < mixing[0].n_in
        and block.n_in != block.n_out
    )


def mixes(layer: Layer | Residual) -> bool:
    """Whether what stands before and behind is in general position: random weights, no identity past them."""
    if isinstance(layer, Residual):
        return any(mixes(part) for part in layer.shortcut) and any(mixes(part) for part in layer.branch)
    return not isinstance(layer.ensemble, PointMass)


def _acts(layer: Layer | Residual) -> bool:
    return layer.activation is not None or layer.dropout > 0


def _facing_slopes(layers: Sequence[Layer | Residual]) -> str | None:
    """A block with an identity shortcut that stands between two activations of the main path."""
    before: str | None = None
    acted = False
    for layer in layers:
        if mixes(layer):
            acted, before = False, None
        elif isinstance(layer, Residual):
            before = layer.name if acted else None
        if _acts(layer):
            if before is not None:
                return before
            acted = True
    return None


def block_assumptions(layers: Sequence[Layer | Residual]) -> tuple[str, ...]:
    """What the law of a chain with blocks takes for granted, and how far off it is where that fails."""
    blocks = [layer for layer in layers if isinstance(layer, Residual)]
    if not blocks:
        return ()
    lines = ["the branch of a residual block in general position to the identity beside it"]
    leading = [block for block in blocks if _begins_with_slopes(block)]
    if len(leading) + sum(_acts(layer) for layer in layers if isinstance(layer, Layer)) > 1 and leading:
        lines.append(
            "branches that begin with an activation: its slopes hardly change from block to block, which the law "
            "does not know; its mean is right, its variance 5 to 25 % too small, its distribution function off by "
            "up to 0.05"
        )
    if sum(_ends_with_slopes(block) for block in blocks) > 1:
        lines.append("branches that end with an activation: mean and variance are exact, higher moments nearly")
    return tuple(lines)


def slopes_persist(layers: Sequence[Layer | Residual]) -> bool:
    """Whether the law is off by more than a finite width explains: see `block_assumptions`."""
    return any("hardly change" in line for line in block_assumptions(layers))


def _begins_with_slopes(block: Residual) -> bool:
    for layer in block.branch:
        if mixes(layer) or isinstance(layer, Residual):
            return False
        if _acts(layer):
            return True
    return False


def _ends_with_slopes(block: Residual) -> bool:
    for layer in reversed(block.branch):
        if _acts(layer):
            return True
        if mixes(layer) or isinstance(layer, Residual):
            return False
    return False
