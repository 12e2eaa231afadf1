"""`python -m kwjax`, also installed as `kwjax`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kwjax.errors import KwjaxError
from kwjax.optional import require


def main(args: Sequence[str] | None = None) -> int:
  """The command; returns the exit status.

  Args:
    args: the arguments, or None: those of the process.
  """
  if list(sys.argv[1:] if args is None else args) == ["--version"]:
    from kwjax.cli.versions import version_text

    print(version_text())
    return 0
  try:
    require("tyro", extra="cli", purpose="the kwjax command")
  except KwjaxError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  from kwjax.cli.main import main as run

  return run(args)


if __name__ == "__main__":
  sys.exit(main())
