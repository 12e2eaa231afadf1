"""`python -m kwjax`, and the command that the wheel installs."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import tomllib

import flax
import jax
import pytest

import kwjax
from kwjax.__main__ import main

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_version_names_what_the_numbers_depend_on(capsys: pytest.CaptureFixture[str]) -> None:
  assert main(["--version"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f"kwjax {kwjax.__version__}"
  assert f"jax {jax.__version__}" in lines
  assert f"flax {flax.__version__}" in lines
  assert f"python {platform.python_version()}" in lines
  assert lines[-1] == f"devices {len(jax.devices())} x {jax.devices()[0].device_kind} ({jax.default_backend()})"


def test_the_wheel_installs_this_command() -> None:
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  entry = importlib.metadata.EntryPoint("kwjax", project["scripts"]["kwjax"], "console_scripts")
  assert entry.load() is main
