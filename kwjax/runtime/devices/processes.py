"""Several processes as one run: how they start, agree, share out work, watch each other and end.

Every process runs the same program. Between two calls of this module they may drift apart; all processes must make these
calls in the same order. In a plain single process each of them is the identity and costs nothing.

Small values go through TCP connections of our own (`kwjax.runtime.devices.watch`), not through a device: a process may then
wait as long as another one works, where a collective would time out.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kwjax.errors import KwjaxError
from kwjax.runtime.devices import launchers, watch
from kwjax.runtime.files import PathLike
from kwjax.runtime.workdir import lock_workdir

T = TypeVar("T")

_START_SECONDS = 60
_HEARTBEAT_SECONDS = 45  # of JAX's own service, which ends the process without our sentence if the watch did not
_SHUTDOWN_SECONDS = 30
_FILE_SECONDS = 20.0
_OFFER_BYTES = 2048

_watch: watch.Watch | None = None
_stopping = False  # agreed upon by all


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
  """Join the other processes of a run; to be called before anything touches a device.

  With three values it uses those; with none it uses what SLURM (`srun`), Open MPI or Cloud TPU say; where they say
  nothing it does nothing. On CPUs the collectives are Gloo's.

  Args:
    coordinator: HOST:PORT at which process 0 is reached by all; the port must be free there.
    num_processes: how many processes take part, at least 1.
    process_id: which of them this one is, from 0.

  Raises:
    KwjaxError: only some of the values are given, one is out of range, or the others cannot be joined. Where they do not
      come within a minute, the process ends with a sentence and status 2.
  """
  given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < len(given):
    raise KwjaxError(f"--coordinator, --num-processes and --process-id belong together: {', '.join(missing)} missing")
  launcher = "these options"
  if coordinator is not None and num_processes is not None and process_id is not None:
    launchers.check(coordinator, num_processes, process_id)
    if num_processes == 1:
      return
  else:
    found = launchers.detected()
    if found is None:
      return
    launcher = found
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # It would swallow SIGTERM, which is the request to save and stop.
  jax.config.update("jax_enable_preemption_service", False)
  where = f" at {coordinator}" if coordinator else ""
  # JAX ends the process with a stack trace when its own time is over; ours ends first, with a sentence.
  patience = threading.Timer(_START_SECONDS, _give_up, [f"{launcher}{where}"])
  patience.daemon = True
  patience.start()
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=_START_SECONDS + 60,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except (RuntimeError, ValueError, OSError) as error:
    if launcher == launchers.TPU_METADATA:
      # A single TPU host may have no metadata server, or one that knows of no other worker.
      warnings.warn(f"no other TPU host was found, so this process runs alone: {_first_line(error)}", stacklevel=2)
      return
    raise KwjaxError(f"cannot join the processes named by {launcher}{where}: {_first_line(error)}") from error
  finally:
    patience.cancel()
  if count() > 1:
    _start_watch(coordinator)


def _give_up(where: str) -> None:
  text = f"error: the processes named by {where} did not all come within {_START_SECONDS} s; start all of them together"
  os.write(2, f"{text}\n".encode())
  os._exit(2)


def count() -> int:
  """Number of processes of the run."""
  return jax.process_count()


def index() -> int:
  """Which of them this one is."""
  return jax.process_index()


def is_main() -> bool:
  """Whether this process writes results and speaks to the user: process 0. Touches no device before `initialize`."""
  return not jax.distributed.is_initialized() or index() == 0


def exchange(value: Any) -> list[Any]:
  """The values of all processes, in their order.

  Args:
    value: anything small that JSON can hold; a float comes back bit by bit.
  """
  if count() == 1:
    return [value]
  # A program that has joined its processes itself comes here without `initialize`.
  link = _watch or _start_watch()
  return [json.loads(text) for text in link.exchange(json.dumps(value))]


def from_main(compute: Callable[[], T]) -> T:
  """What `compute` returns in process 0, in every process; small and JSON-able.

  Raises:
    KwjaxError: `compute` raised it in process 0; with the same message in all.
  """
  if count() == 1:
    return compute()
  result, caught = None, None
  if index() == 0:
    try:
      result = compute()
    except KwjaxError as error:
      caught = error
  result, message = exchange([result, None if caught is None else str(caught)])[0]
  if caught is not None:
    raise caught
  if message is not None:
    raise KwjaxError(message)
  return result


def barrier() -> None:
  """Return when all processes are here."""
  exchange(None)


def share(total: int) -> range:
  """The part of `total` items that falls to this process: contiguous, in order, sizes differing by at most one."""
  return range(total * index() // count(), total * (index() + 1) // count())


def gather(rows: np.ndarray) -> np.ndarray:
  """The rows of all processes one after the other, bit by bit; their number may differ, and be 0.

  Args:
    rows: [n, ...] of any plain dtype; all but n is the same everywhere.
  """
  if count() == 1:
    return rows
  lengths = exchange(len(rows))
  width = int(np.prod(rows.shape[1:], dtype=np.int64)) * rows.dtype.itemsize
  # As bytes: a device would round float64 to float32.
  padded = np.zeros((max(lengths), width), np.uint8)
  padded[: len(rows)] = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).reshape(len(rows), width)
  everything = multihost_utils.process_allgather(padded)
  joined = np.concatenate([part[:n] for part, n in zip(everything, lengths, strict=True)])
  return np.ascontiguousarray(joined).view(rows.dtype).reshape(-1, *rows.shape[1:])


def broadcast(tree: Any) -> Any:
  """Process 0's arrays, bit by bit, in every process; the others give a tree of the same structure, shapes and types."""
  if count() == 1:
    return tree

  def spread(leaf: Any) -> Any:
    array = np.asarray(leaf)
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    received = multihost_utils.broadcast_one_to_all(data) if data.size else data
    return jax.numpy.asarray(np.asarray(received).view(array.dtype).reshape(array.shape))

  return jax.tree.map(spread, tree)


def any_stop(requested: bool) -> bool:
  """Whether any process was asked to stop; all must ask at the same point, and then end in good order."""
  global _stopping
  _stopping = _stopping or any(exchange(bool(requested)))
  return _stopping if count() > 1 else requested


def stop_is_known(requested: bool) -> bool:
  """Whether this process or, as far as this one has heard, another one was asked to stop; may differ between processes.

  For loops over a process's own share, whose ends are agreed upon with `any_stop`.
  """
  if _watch is None:
    return requested
  if requested:
    _watch.announce_stop()
  return requested or _watch.stop_announced


@contextlib.contextmanager
def lock(folder: PathLike) -> Iterator[pathlib.Path]:
  """Hold a folder for this run alone, see `lock_workdir`; process 0 takes it, and all go on or none.

  Raises:
    KwjaxError: another run holds it, or a process does not see the folder that process 0 sees.
  """
  folder = pathlib.Path(folder)
  if count() == 1:
    with lock_workdir(folder) as locked:
      yield locked
    return
  with contextlib.ExitStack() as stack:
    from_main(lambda: str(stack.enter_context(lock_workdir(folder))))
    _check_shared(folder)
    yield folder


def _check_shared(folder: pathlib.Path) -> None:
  """Process 0 writes a file of a random name, and the others look for it."""
  name = from_main(lambda: _touch(folder, f".seen-by-all-{secrets.token_hex(8)}"))
  deadline = time.monotonic() + _FILE_SECONDS
  while not (found := (folder / name).exists()) and time.monotonic() < deadline:
    time.sleep(0.2)  # network file systems show a new file after a while
  blind = [i for i, seen in enumerate(exchange(found)) if not seen]
  if is_main():
    (folder / name).unlink(missing_ok=True)
  if blind:
    raise KwjaxError(
      f"process {blind[0]} of {count()} does not see what process 0 wrote to {folder}: "
      "the working folder of a run of several processes must be on a file system that all of them share"
    )


def _touch(folder: pathlib.Path, name: str) -> str:
  try:
    (folder / name).touch()
  except OSError as error:
    raise KwjaxError(f"cannot write to {folder}: {error.strerror}") from error
  return name


def leave(status: int) -> None:
  """The last call of a run: wait for the others, or, after an error, tell them not to wait and end this process.

  Args:
    status: what the process is going to end with; other than 0 is an error, unless all have agreed to stop.
  """
  global _watch
  if _watch is None:
    return
  if status and not _stopping:
    _watch.say_failed()
    _end_now(status)
  barrier()
  _watch.say_goodbye()
  _watch = None


def wait_for_verdict(seconds: float = 50.0) -> None:
  """After a failed collective: give the watch the time to say which process is gone, and to end this one."""
  if _watch is not None:
    time.sleep(seconds)


def _start_watch(coordinator: str | None = None) -> watch.Watch:
  """Connects this process to process 0, whose address and password go through the devices."""
  global _watch
  offer = {}
  if index() == 0:
    listener, (port, token) = watch.listen()
    hosts = [coordinator.rpartition(":")[0].strip("[]")] if coordinator else []
    offer = {"machine": socket.gethostname(), "hosts": [*hosts, *watch.own_hosts()], "port": port, "token": token}
  text = np.frombuffer(json.dumps(offer).encode().ljust(_OFFER_BYTES), np.uint8)
  offer = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())
  if index() == 0:
    peers = watch.accept(listener, token, count())
  else:
    near = ["localhost"] if offer["machine"] == socket.gethostname() else []
    peers = watch.connect([*near, *offer["hosts"]], offer["port"], offer["token"], index())
  _watch = watch.Watch(index(), count(), peers)
  atexit.register(_at_exit)
  return _watch


def _at_exit() -> None:
  """A script that did not `leave`: its end is an orderly one unless an exception ended it."""
  if _watch is None:
    return
  if getattr(sys, "last_value", None) is None:
    _watch.say_goodbye()
    return
  _watch.say_failed()
  _end_now(1)


def _end_now(status: int) -> None:
  """Without the end of JAX's service, at which this process would wait for the others, who wait for this one."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [""])[0][:300]
