"""The documentation site: builds without a warning, shows every public name, fetches nothing, quotes true numbers."""

from __future__ import annotations

import html
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
import zlib
from typing import Any

import pytest

import kwjax
from tests.docs.pages import DOCS, ROOT

pytest.importorskip("mkdocs", reason='pip install "kwjax[docs]"')

MAX_IMAGE = 150_000


def build(source: pathlib.Path, target: pathlib.Path) -> subprocess.CompletedProcess[str]:
  """`mkdocs build --strict` of the repository at `source`, as a user calls it, without a way to the net."""
  nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
  return subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
    cwd=source,
    env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  target = tmp_path_factory.mktemp("site")
  result = build(ROOT, target)
  assert result.returncode == 0, result.stderr[-4000:]
  assert "WARNING" not in result.stderr
  return target


@pytest.fixture(scope="module")
def inventory(site: pathlib.Path) -> dict[str, str]:
  """What the reference documents: `{canonical path: page}`."""
  content = (site / "objects.inv").read_bytes()
  lines = zlib.decompress(content.split(b"zlib.\n", 1)[1]).decode().splitlines()
  return {fields[0]: fields[3].split("#")[0] for fields in (line.split(" ") for line in lines)}


def canonical(value: Any) -> str:
  return f"{value.__module__}.{value.__qualname__}"


@pytest.mark.parametrize("name", kwjax.__all__)
def test_every_public_name_is_in_the_reference(name: str, site: pathlib.Path, inventory: dict[str, str]) -> None:
  value = getattr(kwjax, name)
  assert not isinstance(value, types.ModuleType)
  page = inventory.get(canonical(value), "")
  assert page.startswith("api/"), f"add '::: {canonical(value)}' to a page in docs/api for kwjax.{name}"
  first = re.sub(r"[`*_\\$]|\s", "", (value.__doc__ or "").split("\n")[0])
  text = html.unescape(re.sub(r"<[^>]+>", "", (site / page).read_text()))
  assert first
  assert first[:40] in re.sub(r"[`*_\\$]|\s", "", text), f"{page} does not say what kwjax.{name} is"


def test_nothing_but_formulas_is_loaded_from_elsewhere(site: pathlib.Path) -> None:
  for page in site.rglob("*.html"):
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(https?:[^\"]+)\"", page.read_text())
    assert {url for url in loaded if "mathjax" not in url} == set(), page


def test_formulas_are_marked_and_readable_without_scripts(site: pathlib.Path) -> None:
  for page, least in (("method.html", 40), ("api/statistics.html", 10)):
    formulas = re.findall(r"class=\"arithmatex\">(.*?)</", (site / page).read_text(), re.DOTALL)
    assert len(formulas) >= least
    assert all(re.fullmatch(r"\\[(\[].*\\[)\]]", formula, re.DOTALL) for formula in formulas)
  # A dollar that no formula took up would be read as money.
  for page in ("method.html", "api/statistics.html", "api/quantization.html", "api/distillation.html"):
    text = re.sub(r"<(code|pre|script|style)\b.*?</\1>", "", (site / page).read_text(), flags=re.DOTALL)
    assert "$" not in re.sub(r"<[^>]+>", "", text), page


def test_folded_lists_and_escapes_of_generated_pages(site: pathlib.Path) -> None:
  text = (site / "results.html").read_text()
  assert re.search(r"<summary>How every cell was measured</summary>\s*<ul>\s*<li>", text)
  assert r"\<" not in text
  assert r"\&lt;" not in text


def test_images_are_small_and_shown() -> None:
  guide = DOCS / "images" / "guide"
  text = "".join(page.read_text() for page in DOCS.rglob("*.md"))
  for image in guide.iterdir():
    assert image.stat().st_size <= MAX_IMAGE, image
    assert f"images/guide/{image.name}" in text, image


def test_quoted_numbers_stand_in_their_sources() -> None:
  sources = [DOCS / "accuracy.md", DOCS / "results.md", ROOT / "benchmarks" / "RESULTS.md"]
  known = set(re.findall(r"\d+\.\d+", "".join(source.read_text() for source in sources)))
  # "93.38 (.09)" is a mean and its deviation; the paper's results are quoted with the paper's name.
  for page in ("../README.md", "settings.md", "limits.md", "index.md", "guide/noise.md"):
    quoted = re.findall(r"(?<![\w.])\d+\.\d{2,}(?![\w.]*\d)", (DOCS / page).read_text())
    assert len(quoted) >= 3
    unknown = sorted({number for number in quoted if len(number.replace(".", "").lstrip("0")) >= 3} - known)
    assert not unknown, f"{page} quotes numbers that no source has: {unknown}"


def test_a_broken_page_stops_the_build(tmp_path: pathlib.Path) -> None:
  for name in ("docs", "kwjax", "benchmarks", "experiments"):
    (tmp_path / name).symlink_to(ROOT / name)
  (tmp_path / "docs").unlink()
  shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("api", "results*"))
  (tmp_path / "docs" / "index.md").write_text(
    "# Home\n\n[nowhere](no_such_page.md) and [no heading](limits.md#no-such)\n"
  )
  config = (ROOT / "mkdocs.yml").read_text()
  (tmp_path / "mkdocs.yml").write_text(config[: config.index("\nnav:")] + "\nnav: [index.md]\n")
  shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
  result = build(tmp_path, tmp_path / "site")
  assert result.returncode != 0
  assert "no_such_page.md" in result.stderr
  assert "#no-such" in result.stderr
