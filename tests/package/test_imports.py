"""`import kwjax` stays cheap: what only some stages need is imported when they run, and every name is there all the same."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import kwjax

# Each takes about as long to import as Flax, or is optional.
HEAVY = (
  *("matplotlib", "jinja2", "PIL", "tyro", "pooch", "requests", "tensorflow_datasets", "orbax", "scipy.stats"),
  *("torch", "onnx", "onnxruntime", "huggingface_hub", "tensorboardX", "mkdocs"),
)


def test_import_loads_nothing_heavy_and_touches_no_device() -> None:
  code = (
    "import sys, json, kwjax, jax\n"
    f"loaded = [m for m in {HEAVY!r} if m in sys.modules]\n"
    "missing = [n for n in kwjax.__all__ if not hasattr(kwjax, n)]\n"
    "jax.config.update('jax_num_cpu_devices', 3)\n"  # refused after the first use of a device
    "print(json.dumps([loaded, missing, jax.device_count()]))"
  )
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
  assert json.loads(done.stdout) == [[], [], 3]


def test_no_module_names_a_private_module_of_jax_or_one_that_only_some_systems_have() -> None:
  folder = pathlib.Path(kwjax.__file__).parents[1]
  sources = [path for name in ("kwjax", "weights_conversion") for path in (folder / name).rglob("*.py")]
  assert len(sources) > 100
  found = []
  for path in sources:
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
      module = getattr(node, "module", None) or ""
      if any(
        f"{module}.{name}".strip(".").startswith(("jax._src", "jaxlib", "fcntl", "msvcrt", "resource"))
        for name in names
      ):
        found.append(f"{path}:{node.lineno}")
  assert not found


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
