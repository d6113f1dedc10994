"""The house shows its plan: imports go one way, and heavy packages stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "torch_rmt"

# "A: {B, ...}" reads "A may import B, and no other of ours"; every room may import itself.
MAY_IMPORT: dict[str, set[str]] = {
    "measures": set(),
    "guard": set(),
    "theory": {"measures"},
    "operators": {"guard"},
    "spectra": {"operators", "measures", "guard"},
    "describe": {"theory", "measures", "guard"},
    "init": {"theory", "measures", "describe", "spectra", "operators", "guard"},
    "compare": {"measures", "theory", "spectra"},
    "learning_rate": {"operators", "spectra", "theory", "measures", "describe", "guard"},
    "tensorboard_plugin": set(),
    "sinks": {"compare", "measures", "spectra", "theory"},
    "diagnose": {
        "measures", "theory", "operators", "spectra", "describe", "init", "compare", "learning_rate", "sinks",
        "guard",
    },
    "callbacks": {
        "measures", "theory", "operators", "spectra", "describe", "init", "compare", "learning_rate", "sinks",
        "diagnose", "guard",
    },
    "demo": {
        "measures", "theory", "operators", "spectra", "describe", "init", "compare", "learning_rate", "sinks",
        "diagnose", "callbacks", "guard",
    },
    "__main__": {
        "measures", "theory", "operators", "spectra", "describe", "init", "compare", "learning_rate", "sinks",
        "diagnose", "callbacks", "demo", "guard",
    },
    "__init__": {"describe", "init", "diagnose", "learning_rate"},
}  # fmt: skip

# A package from outside: the rooms that may import it anywhere, and those that may inside a function only.
OUTSIDE: dict[str, tuple[set[str], set[str]]] = {
    "lightning": ({"callbacks"}, {"demo"}),
    "pytorch_lightning": ({"callbacks", "demo"}, set()),
    "tensorboard": ({"tensorboard_plugin"}, {"sinks"}),
    "torch.utils.tensorboard": (set(), {"sinks"}),
    "matplotlib": (set(), {"sinks", "callbacks", "demo"}),
    "mlxtend": (set(), {"demo"}),
}
WITHOUT_TORCH = {"measures", "theory", "tensorboard_plugin"}
WITHOUT_TORCH_NN = {"measures", "theory", "spectra", "compare", "tensorboard_plugin"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc"}


def sources() -> list[Path]:
    return sorted(
        [
            *(p for p in PACKAGE.rglob("*.py") if "callbacks" not in p.parts),
            *(ROOT / "callbacks").glob("*.py"),
        ]
    )


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if relative.parts[0] == "callbacks" else relative.parts[1].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Every imported dotted name, and whether the import stands at the top (True) or in a function."""
    tree = ast.parse(path.read_text())
    in_function = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in in_function) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [(f"{node.module}.{alias.name}", id(node) not in in_function) for alias in node.names]
    return found


def is_or_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is not in the plan: add it to MAY_IMPORT and to the design"
    for name, at_top in imports_of(path):
        if name.startswith("torch_rmt."):
            target = name.split(".")[1]
            if target == "__version__":
                continue
            assert target == room or target in MAY_IMPORT[room], f"{room} must not import {target} ({name})"
        for package, (anywhere, lazily) in OUTSIDE.items():
            if is_or_below(name, package):
                allowed = anywhere if at_top else anywhere | lazily
                assert room in allowed, f"{room} must not import {name} {'at the top' if at_top else ''}"
        if room in WITHOUT_TORCH:
            assert not is_or_below(name, "torch"), f"{room} is free of torch: {name}"
        if room in WITHOUT_TORCH_NN:
            assert not is_or_below(name, "torch.nn"), f"{room} does not touch torch.nn: {name}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_one_room_each(path: Path) -> None:
    assert path.stem not in FORBIDDEN_NAMES
    assert len(path.read_text().splitlines()) <= 400, "a file over 400 lines: split it by meaning"


def test_the_plan_has_no_cycle() -> None:
    done: set[str] = set()
    left = dict(MAY_IMPORT)
    while left:
        ready = [room for room, needs in left.items() if needs <= done]
        assert ready, f"a cycle among {sorted(left)}"
        done.update(ready)
        for room in ready:
            del left[room]


def test_the_package_list_is_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py") if "callbacks" not in p.parts
    }
    assert set(listed) == found | {"torch_rmt.callbacks"}


@pytest.mark.parametrize(
    "module", ["torch_rmt", "torch_rmt.sinks", "torch_rmt.diagnose", "torch_rmt.tensorboard_plugin"]
)
def test_importing_loads_no_trainer_and_no_plots(module: str) -> None:
    heavy = ("lightning", "pytorch_lightning", "tensorboard", "matplotlib", "mlxtend", "pandas")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
