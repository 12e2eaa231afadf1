"""Wheel and sdist: what is in them, and that the wheel works where there is no repository. Built without network."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from typing import NamedTuple

import pytest

pytest.importorskip("build", reason="needs the extra test")
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ("kwjax", "weights_conversion")
PAGES = ("report.html", "sections.html", "parts.html", "report.css")


class Built(NamedTuple):
  """What was built of a copy of the repository."""

  copy: pathlib.Path
  wheel: pathlib.Path
  sdist: pathlib.Path
  from_sdist: pathlib.Path


def run(*command: str, cwd: pathlib.Path, site: pathlib.Path | None = None) -> str:
  """Output of a Python command that finds the repository neither by its folder nor by PYTHONPATH, but what is in `site`."""
  environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
  environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1"}
  if site is not None:
    environment["PYTHONPATH"] = str(site)  # comes before what is installed
  done = subprocess.run(
    [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False
  )
  assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
  return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
  """The wheel of a copy of the repository without its history, an sdist, and the wheel of the sdist."""
  if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("the tests run beside an installed wheel, without a repository")
  folder = tmp_path_factory.mktemp("build")
  unwanted = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "dist", "runs", "images")
  shutil.copytree(ROOT, folder / "copy", ignore=unwanted)
  (folder / "copy" / "docs" / "images").mkdir(parents=True, exist_ok=True)
  (folder / "copy" / "docs" / "images" / "picture.png").write_bytes(b"\x89PNG")
  run("-m", "build", "--no-isolation", "--outdir", str(folder / "both"), ".", cwd=folder / "copy")
  run("-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder / "wheel"), ".", cwd=folder / "copy")
  (sdist,), (from_sdist,), (wheel,) = (
    list(folder.glob(pattern)) for pattern in ("both/*.tar.gz", "both/*.whl", "wheel/*.whl")
  )
  return Built(folder / "copy", wheel, sdist, from_sdist)


def contents(wheel: pathlib.Path) -> dict[str, bytes]:
  with zipfile.ZipFile(wheel) as archive:
    return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_every_module_and_nothing_else(built: Built) -> None:
  found = set(contents(built.wheel))
  sources = {p.relative_to(built.copy).as_posix() for name in PACKAGES for p in (built.copy / name).rglob("*.py")}
  assert len(sources) > 100
  data = {name for name in found if ".dist-info/" not in name} - sources
  assert sources <= found
  assert data == {"kwjax/py.typed", *(f"kwjax/runtime/reporting/templates/{name}" for name in PAGES)}
  (info,) = {name.split("/")[0] for name in found if ".dist-info/" in name}
  assert f"{info}/licenses/LICENSE" in found
  assert contents(built.wheel)[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
  assert contents(built.wheel)[f"{info}/top_level.txt"].decode().split() == sorted(PACKAGES)


def test_the_sdist_is_small_and_builds_the_same_wheel(built: Built) -> None:
  with tarfile.open(built.sdist) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
  assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "kwjax/py.typed"} <= names
  assert not [name for name in names if name.startswith(("tests", "docs", ".ci")) or name.endswith((".png", ".jpg"))]
  assert contents(built.from_sdist) == contents(built.wheel)


def test_the_installed_wheel_works_from_another_folder(built: Built, tmp_path: pathlib.Path) -> None:
  site = tmp_path / "site"
  run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(built.wheel), cwd=tmp_path)
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  check = "import kwjax, weights_conversion, importlib.metadata as m; from kwjax.runtime.reporting.report import write_report; "
  check += "write_report({'network': 'net', 'command': 'as <installed>'}, '../report'); "
  check += "print(*(p.__file__ for p in (kwjax, weights_conversion)), sep='\\n'); "
  check += "print(kwjax.__version__, m.version('kwjax'))"
  *files, versions = run("-c", check, cwd=elsewhere, site=site).splitlines()
  assert all(pathlib.Path(file).is_relative_to(site) for file in files)
  assert "as &lt;installed&gt;" in (tmp_path / "report" / "report.html").read_text()
  with zipfile.ZipFile(built.wheel) as archive:
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    version = HeaderParser().parsestr(archive.read(metadata).decode())["Version"]
  assert versions == f"{version} {version}"

  assert run("-m", "kwjax", "--version", cwd=elsewhere, site=site).startswith(f"kwjax {version}\n")
  assert "--source" in run("-m", "weights_conversion", "--help", cwd=elsewhere, site=site)
  assert not list(elsewhere.iterdir())
