"""How every command reads its command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")

_PIPE_CLOSED = 141  # what a shell reports of a program that SIGPIPE ended


def parse(options: type[T], args: Sequence[str] | None, prog: str, description: str | None) -> T:
  """The options that a command line sets.

  Args:
    options: a dataclass, a field an option.
    args: the arguments, or None: those of the process.
    prog: how the command is called, "python -m experiments.export".
    description: what `--help` says above the options.

  Raises:
    SystemExit: after `--help`, for arguments that are wrong, or because nobody reads the help to its end, as in `--help | head`.
  """
  try:
    try:
      return tyro.cli(options, args=args, prog=prog, description=description)
    finally:
      sys.stdout.flush()
  except BrokenPipeError:
    # Else Python complains once more when it ends and cannot write what is left.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(_PIPE_CLOSED) from None
