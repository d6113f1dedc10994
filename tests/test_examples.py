"""Every example runs, in a folder of its own, in seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
QUICK = {"gallery.py": ["--quick"]}
SAYS = {
    "lightning_mnist.py": ["jacobian:", "hessian:", "fisher:"],
    "plain_loop.py": ["step 80:", "page: "],
    "initialise.py": ["ordered phase", "layers drawn (orthogonal)"],
}


def test_the_examples_of_the_readme_are_there() -> None:
    assert set(SAYS) <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path), *QUICK.get(path.name, [])],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for words in SAYS.get(path.name, []):
        assert words in done.stdout
