"""Packages of extras: imported where used, and named with their extra where they are missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kwjax.errors import KwjaxError
from kwjax.optional import require


def test_an_installed_module_is_returned() -> None:
  assert require("json.decoder", extra="none", purpose="a test") is sys.modules["json.decoder"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "jinja2", None)  # what Python does with a module that may not be imported
  with pytest.raises(
    KwjaxError, match=r"^writing the report needs the package jinja2: pip install \"kwjax\[report\]\""
  ):
    require("jinja2", extra="report", purpose="writing the report")


@pytest.mark.parametrize(
  ("package", "module", "extra"),
  [
    ("matplotlib", "kwjax.analysis.figures", "report"),
    ("importlib_resources", "kwjax.runtime.data_tfds", "tfds"),
    ("array_record", "kwjax.runtime.tfds_writer", "tfds"),
  ],
)
def test_modules_that_need_an_extra_name_it(package: str, module: str, extra: str) -> None:
  code = f"import sys; sys.modules[{package!r}] = None; import {module}"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  last = done.stderr.splitlines()[-1]
  assert f'needs the package {package}: pip install "kwjax[{extra}]"' in last
