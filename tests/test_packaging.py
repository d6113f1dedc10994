"""One `callbacks` folder, met in a wheel, an sdist, a checkout, and a checkout without symlinks."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORT = "import torch_rmt.callbacks as c; print(c.__file__); c.SpectralMonitor"
TAB = (
    "import inspect; from tensorboard import default; found = default.get_dynamic_plugins();"
    "(tab,) = [f for f in found if f.__name__ == 'SpectraLoader']; tab().load;"
    "print(inspect.getfile(tab), 'torch' in sys.modules, 'torch_rmt' in sys.modules)"
)


# The suite runs in an editable install, whose finder would answer before the copy under test does.
ALONE = "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]"


def run(code: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; {ALONE}; sys.path.insert(0, {str(path)!r}); {code}"],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, as a clone would have it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("torch_rmt", "callbacks"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "torch_rmt_tensorboard.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_link_is_relative(checkout: Path) -> None:
    link = ROOT / "torch_rmt" / "callbacks"
    assert link.is_symlink()
    assert str(link.readlink()) == "../callbacks"


def test_a_checkout_without_symlinks_still_imports(checkout: Path, tmp_path: Path) -> None:
    copy = tmp_path / "no-symlinks"
    shutil.copytree(checkout, copy, symlinks=True)
    (copy / "torch_rmt" / "callbacks").unlink()
    (copy / "torch_rmt" / "callbacks").write_text("../callbacks")  # what git writes where it cannot link
    result = run(IMPORT, tmp_path, copy)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == copy / "callbacks" / "__init__.py"


def test_the_folder_is_not_importable_by_its_bare_name(checkout: Path, tmp_path: Path) -> None:
    result = run("import callbacks", tmp_path, checkout)
    assert result.returncode != 0
    assert "torch_rmt.callbacks" in result.stderr


def test_the_wheel_and_the_sdist_hold_the_callbacks_once(checkout: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(checkout)],
        check=True, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "torch_rmt/callbacks/__init__.py" in names
    assert "torch_rmt/py.typed" in names
    assert not [n for n in names if n.startswith("callbacks/")]
    assert len(names) == len(set(names))
    pages = [*(ROOT / "torch_rmt" / "sinks").glob("*.html"), *(ROOT / "torch_rmt").glob("tensorboard_plugin/static/*")]
    data = {p.relative_to(ROOT).as_posix() for p in pages}
    assert {"torch_rmt/sinks/page.html", "torch_rmt/tensorboard_plugin/static/index.js"} <= data <= set(names)

    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {n.split("/", 1)[-1] for n in archive.getnames()}
    assert {"callbacks/__init__.py", "torch_rmt_tensorboard.py", *data} <= held

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    result = run(IMPORT, tmp_path, site)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == site / "torch_rmt" / "callbacks" / "__init__.py"

    # TensorBoard finds the tab in the wheel, and loads neither PyTorch nor the rest of torch_rmt for it.
    result = run(TAB, tmp_path, site)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(site / "torch_rmt" / "tensorboard_plugin" / "plugin.py"), "False", "False"]
