"""What every command does around its own work: devices, the network, one folder, a compilation cache, one clear error."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import signal
from collections.abc import Callable

import jax

from kwjax.errors import Interrupted, KwjaxError, WeightsError
from kwjax.network import Network, load_network
from kwjax.quantization import QuantizedNetwork, load_quantized
from kwjax.quantization.store import QUANTIZATION_FILE
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.launch import keep_freed_memory
from kwjax.runtime.devices.parallel import DeviceGroup, device_group
from kwjax.runtime.reporting.messages import log_error
from kwjax.runtime.workdir import LOCK_FILES, Shutdown, graceful_shutdown

USAGE_ERROR = 2
_TERMINATED = 128 + signal.SIGTERM
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
    log_error(f"error: {error}")
    return USAGE_ERROR
  except Interrupted as stop:
    log_error(f"{stop}; the same command goes on from there")
    return stop.exit_status
  except KeyboardInterrupt:
    log_error("interrupted; the same command goes on from the last checkpoint")
    return 130
  except OSError as error:
    if error.errno not in _SYSTEM_REFUSES:
      raise
    where = f": {error.filename}" if error.filename else ""
    log_error(
      f"error: {error.strerror or error}{where}; what was finished is kept, the same command goes on from there"
    )
    return USAGE_ERROR
  except SystemExit as stop:
    if stop.code == _TERMINATED:
      log_error("stopped; the same command goes on from the last checkpoint")
    return stop.code if isinstance(stop.code, int) else USAGE_ERROR
  except MemoryError:
    log_error("error: out of memory; a smaller --batch-size or fewer --duplicates need less (see --dry-run)")
    return USAGE_ERROR
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      processes.wait_for_verdict()
      raise
    log_error(
      "error: the device is out of memory; a smaller --batch-size or fewer --duplicates need less (see --dry-run)"
    )
    return USAGE_ERROR


def get_network(
  folder: pathlib.Path | None, arch: str | None, weights: str | None, *, default: str | None = None
) -> Network:
  """The network that --network, --arch and --weights name, or else the embedded one of an architecture.

  Args:
    folder: of --network.
    arch: of --arch.
    weights: of --weights.
    default: architecture of the embedded network that is taken where nothing is named, or None.

  Raises:
    KwjaxError: the options contradict each other, name nothing, or the weights are unusable.
  """
  from weights_conversion.convert import convert

  if folder is not None:
    if arch or weights:
      raise KwjaxError("--network already says which network: give it, or --arch with --weights, not both")
    return load_network(folder)
  if weights is not None or arch is not None:
    if arch is None or weights is None:
      raise KwjaxError("--arch and --weights belong together: --arch resnet18 --weights torchvision")
    return convert(arch, weights)
  if default is None:
    raise KwjaxError(
      "no network was given: --network FOLDER (written by python -m weights_conversion), or --arch NAME --weights FILE"
    )
  try:
    return convert(default, "demo")
  except WeightsError as error:
    raise WeightsError(f"{error}; or name your own network with --network FOLDER or --arch with --weights") from error


def load_any(folder: pathlib.Path) -> Network | QuantizedNetwork:
  """The float or quantized network in a folder.

  Raises:
    KwjaxError: there is none, or it is damaged.
  """
  return load_quantized(folder) if (folder / QUANTIZATION_FILE).exists() else load_network(folder)


def in_workdir(folder: pathlib.Path, work: Callable[[pathlib.Path, Shutdown], None], *, resume: bool = True) -> None:
  """Run `work(folder, shutdown)` with the folder locked and signals turned into a request to stop.

  Args:
    folder: of the run.
    work: what is done there.
    resume: go on with what an earlier run left there; False removes it.

  Raises:
    KwjaxError: another process uses the folder.
  """
  with processes.lock(folder), graceful_shutdown() as shutdown:
    if not resume:
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
