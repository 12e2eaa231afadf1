"""Packages of extras: imported where used, and named with their extra where they are missing."""

from __future__ import annotations

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
