"""The command lines of the experiments."""

from __future__ import annotations

import os
import subprocess
import sys

_PROGRAM = """
import dataclasses
from experiments._harness.arguments import parse

@dataclasses.dataclass
class Options:
  steps: int = 1

print(parse(Options, None, "some", "What it does.").steps)
"""


def test_help_whose_reader_has_left_ends_without_a_traceback():
  read, write = os.pipe()
  os.close(read)
  try:
    done = subprocess.run(
      [sys.executable, "-c", _PROGRAM, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
  finally:
    os.close(write)
  assert (done.returncode, done.stderr) == (141, "")


def test_options_come_from_the_command_line_and_help_names_the_experiment():
  run = lambda *args: subprocess.run(
    [sys.executable, "-c", _PROGRAM, *args], capture_output=True, text=True, timeout=120
  )
  assert run("--steps", "7").stdout == "7\n"
  shown = run("--help")
  assert shown.returncode == 0
  assert "python -m experiments.some" in shown.stdout
  assert "What it does." in shown.stdout
  assert run("--step", "7").returncode == 2
