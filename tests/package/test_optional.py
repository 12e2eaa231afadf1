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


def test_modules_that_need_an_extra_name_it() -> None:
  code = """
import importlib, sys
for package, module in (
  ("matplotlib", "kwjax.analysis.figures"),
  ("importlib_resources", "kwjax.runtime.data.tfds_sets"),
  ("array_record", "kwjax.runtime.data.tfds_writer"),
):
  sys.modules[package] = None
  try:
    importlib.import_module(module)
  except Exception as error:
    print(type(error).__name__, error)
  del sys.modules[package]
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  lines = done.stdout.splitlines()
  assert [line.partition("(")[0].strip() for line in lines] == [
    'KwjaxError drawing a figure needs the package matplotlib: pip install "kwjax[report]"',
    'KwjaxError a data set of tensorflow-datasets needs the package importlib_resources: pip install "kwjax[tfds]"',
    'KwjaxError a data set of tensorflow-datasets needs the package array_record: pip install "kwjax[tfds]"',
  ]
