"""`import kwjax` stays cheap: what only some stages need is imported when they run, and every name is there all the same."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import kwjax

# Each takes about as long to import as Flax, or is optional.
HEAVY = ("matplotlib", "tensorflow_datasets", "orbax", "tyro", "torch", "onnx", "onnxruntime", "tensorboardX", "mkdocs")


def test_import_loads_nothing_heavy_and_touches_no_device() -> None:
  code = (
    "import sys, json, kwjax; import jax._src.xla_bridge as bridge; "
    f"print(json.dumps([[m for m in {HEAVY!r} if m in sys.modules], bridge.backends_are_initialized(), "
    "sorted(n for n in kwjax.__all__ if not hasattr(kwjax, n))]))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert json.loads(done.stdout) == [[], False, []]


def test_all_is_sorted_and_holds_what_the_package_imports() -> None:
  assert list(kwjax.__all__) == sorted(kwjax.__all__)
  assert len(set(kwjax.__all__)) == len(kwjax.__all__)
  public = {
    name
    for name, value in vars(kwjax).items()
    if not name.startswith("_") and getattr(value, "__module__", "").startswith("kwjax.")
  }
  assert public == set(kwjax.__all__)


def test_the_version_is_that_of_the_installation() -> None:
  assert kwjax.__version__ == importlib.metadata.version("kwjax")
