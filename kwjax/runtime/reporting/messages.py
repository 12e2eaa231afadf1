"""Lines for the person who watches a run; all go to the standard error stream, as progress bars do."""

from __future__ import annotations

import sys

from kwjax.runtime.devices import processes


def log(text: str) -> None:
  """Write a line, once for all processes of a run."""
  if processes.is_main():
    log_error(text)


def log_error(text: str) -> None:
  """Write a line from this process, whichever it is."""
  print(text, file=sys.stderr, flush=True)
