"""The command line: `torch-rmt demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_rmt import __version__


def parser() -> argparse.ArgumentParser:
    """Build the parser of `torch-rmt`."""
    top = argparse.ArgumentParser(
        prog="torch-rmt",
        description="Spectra of a network beside the laws that random matrix theory predicts.",
    )
    top.add_argument("--version", action="version", version=f"torch-rmt {__version__}")
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train a deep network on MNIST from two initialisations and compare their spectra",
        description="Train the same deep tanh network on real MNIST digits twice, with PyTorch's default "
        "initialisation and after critical_init_, and compare. Takes a minute or two on two cores.",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        help="folder for logs and page (%(default)s)",
    )
    demo.add_argument("--figure", type=Path, default=None, help="save the Jacobians at step 0 as this PNG, too")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    chosen = parser().parse_args(arguments)
    try:
        # Late, so that --help does not wait for Lightning.
        from torch_rmt.demo import run

        run(chosen.out, figure=chosen.figure)
    except ImportError as error:
        print(f"torch-rmt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
