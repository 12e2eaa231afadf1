"""Start-up of a command, before JAX is imported."""

from __future__ import annotations

import importlib.util
import pathlib
import runpy


def relaunch_with_huge_pages() -> None:
  """See `kwjax.runtime.devices.launch`, whose file is run by itself: importing it as part of kwjax would bring JAX."""
  package = importlib.util.find_spec("kwjax")
  assert package is not None
  assert package.origin is not None
  runpy.run_path(str(pathlib.Path(package.origin).parent / "runtime" / "devices" / "launch.py"))[
    "relaunch_with_huge_pages"
  ]()
