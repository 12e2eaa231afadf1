"""Shared fixtures: the folder of real weights and images, absent on most machines."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

# Programs that were compiled once, for all workers of a run and for the processes that tests start. The first process to come
# here, which starts the workers, makes the folder and removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kwjax-tests-")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Tracing makes many short-lived objects beside a large heap that stays; to look through it rarely saves a fifteenth of the time.
gc.set_threshold(200_000, 50, 100)

# Half of the time that compiling takes with few optimizations, see `quick_compilation`. XLA ends a process at a flag that it does
# not know, so another process tries it, once for all workers.
QUICK_CODE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if "KWJAX_TESTS_XLA_FLAGS" not in os.environ:
  probe = [sys.executable, "-c", "import jaxlib.xla_client; jaxlib.xla_client.CompileOptions()"]
  flags = {**os.environ, "XLA_FLAGS": QUICK_CODE}
  known = subprocess.run(probe, env=flags, capture_output=True, check=False).returncode == 0
  os.environ["KWJAX_TESTS_XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_CODE if known else ''}".strip()

# Eight CPU devices for the whole run, before jax is imported: tests of many devices use them, all others use the first.
os.environ["XLA_FLAGS"] = f"{os.environ['KWJAX_TESTS_XLA_FLAGS']} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest

from kwjax import kernels

kernels._asked_for()  # of the environment outside; it reads once what `quick_compilation` changes for other processes
WITH_KERNELS = ("kernels", "models", "weights_conversion", "runtime", "export", "tests")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
  """Most of the time of a test of tiny networks is LLVM's optimizer; modules whose programs run long are marked `optimized`.

  The processes that a test starts compile as it does. Tests of the stages take plain convolutions, whose programs are smaller;
  those in `WITH_KERNELS` take what users have.
  """
  quick = request.node.get_closest_marker("optimized") is None
  jax.config.update("jax_disable_most_optimizations", quick)
  plain = request.path.parent.name not in WITH_KERNELS
  with kernels.enabled(False) if plain else contextlib.nullcontext(), pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quick)))
    if plain:
      patch.setenv(kernels.VARIABLE, "off")
    yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """Folder with `cifar10/`, `weights/` and `imagenet/`; the test is skipped where there is none."""
  default = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
  folder = pathlib.Path(os.environ.get("KWJAX_SHARED_DATA", default))
  if not folder.is_dir():
    pytest.skip(f"needs real weights and images: set KWJAX_SHARED_DATA (no folder {folder})")
  return folder
