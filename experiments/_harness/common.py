"""What every experiment does around its own work: one clear error, one folder, a compilation cache, remembered stages."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments._harness.launch import has_huge_pages
from experiments._harness.options import Options
from kwjax.errors import CheckpointError, Interrupted, KwjaxError, WeightsError
from kwjax.network import Network, load_network
from kwjax.runtime import processes
from kwjax.runtime.files import check_settings, read_sealed_json, write_sealed_json
from kwjax.runtime.parallel import DeviceGroup, device_group
from kwjax.runtime.workdir import LOCK_FILES, Shutdown, graceful_shutdown

USAGE_ERROR = 2
_TERMINATED = 128 + signal.SIGTERM
_LARGE_BLOCK = 256 << 20  # bytes
_HEAP = 64 << 20  # bytes of a heap, of which glibc makes every arena but the first
_ARENAS = 4
# A full or broken disk, a folder that may not be written: nothing that a traceback would help with.
_SYSTEM_REFUSES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


def cache_folder() -> pathlib.Path:
  """`$KWJAX_CACHE`, or `~/.cache/kwjax`."""
  return pathlib.Path(os.environ.get("KWJAX_CACHE") or pathlib.Path.home() / ".cache" / "kwjax")


def use_compilation_cache() -> None:
  """Keep compiled programs between runs, unless the user has chosen a place or a policy already."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def keep_freed_memory() -> None:
  """Tell glibc to keep freed memory for the next step instead of giving it back to the system after each; see launch.py.

  On huge pages the large blocks, a step's temporary memory, are given back all the same: fetching them anew costs next to
  nothing there, and kept in the heap they would break up, until it held half as much again. Several arenas: one alone is left
  full of the holes of compilation, among which every later step searches (702 ms instead of 535 for MobileNetV2's step of
  fine-tuning). Few, because each keeps what was freed in it.
  """
  try:
    mallopt = ctypes.CDLL("libc.so.6").mallopt
  except (OSError, AttributeError):
    return  # another C library
  m_trim_threshold, m_top_pad, m_mmap_threshold, m_mmap_max, m_arena_max = -1, -2, -3, -4, -8
  mallopt(m_trim_threshold, -1)
  # The other arenas grow by heaps, and give an empty one back unless the heap before it lacks room for so much.
  mallopt(m_top_pad, _HEAP)
  mallopt(m_arena_max, _ARENAS)
  gives_back = has_huge_pages() and mallopt(m_mmap_threshold, _LARGE_BLOCK) == 1
  mallopt(m_mmap_max, 65536 if gives_back else 0)


def use_every_core(devices: int | None) -> None:
  """Make the CPU as many devices as are wanted, by default one a core, unless the user has chosen a number already.

  XLA runs most convolutions of one CPU device on one core; two devices with half of the batch each finish in half the time.

  Args:
    devices: of --devices.
  """
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
    return
  # Where JAX runs already, as in a notebook, it keeps the devices it has.
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", devices or _cores())


def every_device(devices: int | None) -> DeviceGroup:
  """The devices of --devices; by default all accelerators, or the CPU's devices up to one a core.

  Raises:
    KwjaxError: more are asked for than there are.
  """
  local = jax.local_devices()
  if devices is None and local[0].platform == "cpu":
    devices = min(len(local), _cores())
  return device_group(devices)


def start(
  devices: int | None, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> DeviceGroup:
  """What every experiment begins with: the other processes, the devices, the compilation cache; from those four options.

  Raises:
    KwjaxError: there are fewer devices, or the other processes cannot be joined.
  """
  use_every_core(devices)
  processes.initialize(coordinator, num_processes, process_id)
  use_compilation_cache()
  keep_freed_memory()
  return every_device(devices)


def _cores() -> int:
  """Processors this process may use, as far as more devices still pay: each holds its own copy of the network."""
  return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)


def say(text: str) -> None:
  """A line for the person who watches, from one process; progress bars use the same stream."""
  if processes.is_main():
    complain(text)


def complain(text: str) -> None:
  """A line that every process writes: what stopped it."""
  print(text, file=sys.stderr, flush=True)


def run_command(work: Callable[[], int | None]) -> int:
  """Run an experiment and turn what users can cause into one sentence and an exit status; the end of all its processes.

  Returns:
    0, 2 after an error of the user's, 130 or 143 after Ctrl-C or SIGTERM.
  """
  status = _status_of(work)
  processes.leave(status)
  return status


def _status_of(work: Callable[[], int | None]) -> int:
  try:
    return work() or 0
  except KwjaxError as error:
    complain(f"error: {error}")
    return USAGE_ERROR
  except Interrupted as stop:
    complain(f"{stop}; the same command goes on from there")
    return stop.exit_status
  except KeyboardInterrupt:
    complain("interrupted; the same command goes on from the last checkpoint")
    return 130
  except OSError as error:
    if error.errno not in _SYSTEM_REFUSES:
      raise
    where = f": {error.filename}" if error.filename else ""
    complain(f"error: {error.strerror or error}{where}; what was finished is kept, the same command goes on from there")
    return USAGE_ERROR
  except SystemExit as stop:
    if stop.code == _TERMINATED:
      complain("stopped; the same command goes on from the last checkpoint")
    return stop.code if isinstance(stop.code, int) else USAGE_ERROR
  except MemoryError:
    complain("error: out of memory; a smaller --batch-size or fewer --duplicates need less (see --dry-run)")
    return USAGE_ERROR
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      processes.wait_for_verdict()
      raise
    complain(
      "error: the device is out of memory; a smaller --batch-size or fewer --duplicates need less (see --dry-run)"
    )
    return USAGE_ERROR


def get_network(options: Options, *, default: str | None) -> Network:
  """The network that the options name: --network FOLDER, --arch with --weights, or the default source.

  Raises:
    KwjaxError: the options contradict each other, name nothing, or the weights are unusable.
  """
  from weights_conversion.convert import convert

  if options.network is not None:
    if options.arch or options.weights:
      raise KwjaxError("--network already says which network: give it, or --arch with --weights, not both")
    return load_network(options.network)
  if options.weights is not None or options.arch is not None:
    if options.arch is None or options.weights is None:
      raise KwjaxError("--arch and --weights belong together: --arch resnet18 --weights torchvision")
    return convert(options.arch, options.weights)
  if default is None:
    raise KwjaxError(
      "no network was given: --network FOLDER (written by python -m weights_conversion), or --arch NAME --weights FILE"
    )
  try:
    return convert(default, "demo")
  except WeightsError as error:
    raise WeightsError(f"{error}; or name your own network with --network FOLDER or --arch with --weights") from error


class Stages:
  """Results of finished stages in a run's folder, so that a resumed run does none of them twice."""

  def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Opens the folder of a run.

    Raises:
      CheckpointError: the folder belongs to a run with other settings; each difference is named.
    """
    self.folder = folder
    path = folder / "settings.json"

    def open_folder() -> None:
      if path.exists():
        check_settings(folder, _stored_settings(path), settings)
      else:
        write_sealed_json(path, settings)

    processes.from_main(open_folder)

  def once(self, name: str, compute: Callable[[], Any]) -> Any:
    """The JSON-able result of `compute`, computed at most once in the life of the folder unless its file is damaged.

    All processes compute, one writes, and all read.
    """
    path = self.folder / "stages" / f"{name}.json"

    def is_finished() -> bool:
      if not path.exists():
        return False
      try:
        read_sealed_json(path)
      except CheckpointError as error:
        say(f"{error}; this stage is done again")
        return False
      return True

    if not processes.from_main(is_finished):
      result = _finite(compute())
      processes.from_main(lambda: str(write_sealed_json(path, {"result": result})))
    return read_sealed_json(path)["result"]


def _stored_settings(path: pathlib.Path) -> dict[str, Any]:
  try:
    return read_sealed_json(path)
  except CheckpointError as error:
    # Without them nothing tells whose results the folder holds.
    raise CheckpointError(f"{error}; --no-resume starts over in this folder") from error


def _finite(value: Any) -> Any:
  """JSON has no infinity: the signal-to-noise ratio of an exact copy, say, becomes null."""
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def in_workdir(folder: pathlib.Path, options: Options, work: Callable[[pathlib.Path, Shutdown], None]) -> None:
  """Run `work(folder, shutdown)` with the folder locked and signals turned into a request to stop.

  Raises:
    KwjaxError: another process uses the folder.
  """
  with processes.lock(folder), graceful_shutdown() as shutdown:
    if not options.resume:
      processes.from_main(lambda: _clear(folder))
    try:
      work(folder, shutdown)
    except Interrupted as stop:
      stop.exit_status = shutdown.exit_status or stop.exit_status
      raise


def _clear(folder: pathlib.Path) -> None:
  """Remove what a run wrote into its folder.

  Raises:
    KwjaxError: no run wrote there, so what is there belongs to somebody else.
  """
  if not (folder / "settings.json").exists():
    if any(entry.name not in LOCK_FILES for entry in folder.iterdir()):
      raise KwjaxError(f"--no-resume removes results, but {folder} holds none of a run: choose another --workdir")
    return
  for name in ("settings.json", "report.json", "report.html", "tables.csv"):
    (folder / name).unlink(missing_ok=True)
  for name in ("stages", "synthesis", "gaussian", "distillation", "training", "quantized", "figures", "tensorboard"):
    shutil.rmtree(folder / name, ignore_errors=True)
