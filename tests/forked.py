"""Processes that are forked from one that has imported what they need, which takes longer than what many of them do."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Mapping

import jax
import tqdm

# It imports and uses no device, so that a fork may choose its own.
_SERVER = multiprocessing.get_context("forkserver")
_IMPORTED = ("tests.forked", "experiments.cifar_bns", "kwjax.cli.compress_report", "weights_conversion.convert")
_SERVER.set_forkserver_preload([*_IMPORTED, "orbax.checkpoint", "jinja2", "matplotlib.pyplot", "scipy.stats"])


def _run(target: Callable[..., int | None], given: tuple, log: pathlib.Path, variables: Mapping[str, str]) -> None:
  with open(log, "wb") as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  os.environ.update(variables)
  # JAX has read these when it was imported.
  jax.config.update("jax_disable_most_optimizations", True)
  jax.config.update("jax_compilation_cache_dir", variables["JAX_COMPILATION_CACHE_DIR"])
  seconds = float(variables.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0.0))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
  tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process would leave behind
  sys.exit(target(*given))


class Forked:
  """A process that runs `target(*given)`, with the methods of `subprocess.Popen`; what it says goes to `log`."""

  def __init__(
    self, target: Callable[..., int | None], given: tuple, log: pathlib.Path, variables: Mapping[str, str]
  ) -> None:
    log.touch()
    self._process = _SERVER.Process(target=_run, args=(target, given, log, dict(variables)), daemon=True)
    self._process.start()
    assert self._process.pid is not None
    self.pid = self._process.pid

  def poll(self) -> int | None:
    """Exit status, or None while it runs."""
    return self._process.exitcode

  def wait(self, seconds: float | None = None) -> int:
    """Exit status.

    Raises:
      TimeoutError: it still runs.
    """
    self._process.join(seconds)
    if self._process.exitcode is None:
      raise TimeoutError(f"process {self.pid} still runs")
    return self._process.exitcode

  def send_signal(self, number: signal.Signals) -> None:
    """Sends a signal, if it still runs."""
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self) -> None:
    """Ends it by force."""
    self._process.kill()
