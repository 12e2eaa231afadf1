"""`python -m kwjax`."""

from __future__ import annotations

import platform

import flax
import jax
import pytest

import kwjax
from kwjax.__main__ import _COMMANDS, installed_commands, main


def test_version_names_what_the_numbers_depend_on(capsys: pytest.CaptureFixture[str]) -> None:
  assert main(["--version"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f"kwjax {kwjax.__version__}"
  assert f"jax {jax.__version__}" in lines
  assert f"flax {flax.__version__}" in lines
  assert f"python {platform.python_version()}" in lines
  assert lines[-1] == f"devices {len(jax.devices())} x {jax.devices()[0].device_kind} ({jax.default_backend()})"


def test_help_lists_the_commands_that_there_are(
  capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  assert set(installed_commands()) == set(_COMMANDS)
  assert main([]) == 0
  text = capsys.readouterr().out
  for module in _COMMANDS:
    assert f"  python -m {module} " in text
  monkeypatch.setitem(_COMMANDS, "experiments.no_such", "nothing")
  monkeypatch.setitem(_COMMANDS, "no_such_package.command", "nothing")
  assert {"experiments.no_such", "no_such_package.command"}.isdisjoint(installed_commands())
