"""How command lines are read."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from kwjax.cli.arguments import parse

_PROGRAM = """
import dataclasses
from kwjax.cli.arguments import parse

@dataclasses.dataclass
class Options:
  steps: int = 1

parse(Options, None, "kwjax some", "What it does.")
"""


@dataclasses.dataclass
class Options:
  """One option."""

  steps: int = 1


def test_help_whose_reader_has_left_ends_without_a_traceback() -> None:
  read, write = os.pipe()
  os.close(read)
  try:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
  finally:
    os.close(write)
  assert (done.returncode, done.stderr) == (141, "")


def test_options_come_from_the_command_line_and_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
  assert parse(Options, ["--steps", "7"], "kwjax some", "What it does.").steps == 7
  for given, status in ((["--help"], 0), (["--step", "7"], 2)):
    with pytest.raises(SystemExit) as stop:
      parse(Options, given, "kwjax some", "What it does.")
    assert stop.value.code == status
  shown = capsys.readouterr()
  assert "usage: kwjax some" in shown.out
  assert "What it does." in shown.out
  assert "Traceback" not in shown.err
