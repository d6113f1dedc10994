"""Every `>>>` example in a docstring and every Python block of the README runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples() -> list[doctest.DocTest]:
    """Read from the source: the run-time type checks wrap functions and hide them from doctest's finder."""
    parser, found = doctest.DocTestParser(), []
    inside = [p for p in (ROOT / "torch_rmt").rglob("*.py") if "callbacks" not in p.parts]
    for path in sorted([*inside, *(ROOT / "callbacks").glob("*.py")]):
        if path.name == "__main__.py":
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "torch_rmt" else ("torch_rmt", *parts)
        module = ".".join(parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = ast.get_docstring(node)
            if text and ">>>" in text:
                name = f"{module}:{getattr(node, 'name', 'module')}"
                line = getattr(node, "lineno", 0)
                found.append(parser.get_doctest(text, {"__module_name__": module}, name, str(path), line))
    return found


@pytest.mark.parametrize("example", examples(), ids=lambda e: e.name)
def test_docstring_examples_run(example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example.globs.update(vars(importlib.import_module(example.globs.pop("__module_name__"))))
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(example, out=failures.append)
    assert not failures, "".join(failures)


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_every_law_of_the_readme_exists() -> None:
    names = re.findall(r"`(measures|theory)\.(\w+)`", (ROOT / "README.md").read_text())
    assert len(names) >= 20
    for package, name in names:
        assert hasattr(importlib.import_module(f"torch_rmt.{package}"), name), f"{package}.{name}"
