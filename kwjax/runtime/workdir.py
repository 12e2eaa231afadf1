"""One run, one folder: a lock against a second process, and an orderly end when the run is asked to stop."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

from kwjax.errors import KwjaxError
from kwjax.runtime.files import PathLike

_LOCK_NAME = ".lock"


@contextlib.contextmanager
def lock_workdir(folder: PathLike) -> Iterator[pathlib.Path]:
  """Holds `folder` for this process alone until the block ends; the folder is made where there is none.

  The lock belongs to the open file (`flock`), not to the file's existence: the kernel drops it with the process, so a
  run that was killed leaves nothing to clean up. Of several processes of one run, only one may take it.

  Args:
    folder: the run's working folder.

  Yields:
    The folder as a `pathlib.Path`.

  Raises:
    KwjaxError: another process holds the folder (named with its process number), or the folder cannot be locked.
  """
  folder = pathlib.Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # Opened without truncation: the text inside names the owner for whoever is refused.
    descriptor = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
  except OSError as error:
    reason = "it is a file" if folder.is_file() else error.strerror
    raise KwjaxError(f"cannot use {folder} as working folder: {reason}") from error
  try:
    _take(descriptor, folder)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    # The file stays: removing it would let two later runs lock two different files of the same name.
    yield folder
  finally:
    os.close(descriptor)


def _take(descriptor: int, folder: pathlib.Path) -> None:
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
      raise KwjaxError(f"cannot lock {folder}: {error.strerror}") from error
    owner = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "unknown"
    raise KwjaxError(
      f"{folder} is in use by process {owner}: wait for it, stop it, or choose another working folder"
    ) from error


class Shutdown:
  """Whether the run was asked to stop: invariant, `requested` turns true once and stays true."""

  def __init__(self) -> None:
    self._signal: int | None = None

  @property
  def requested(self) -> bool:
    """True from the first SIGINT or SIGTERM on."""
    return self._signal is not None

  @property
  def exit_status(self) -> int:
    """128 plus the number of the signal that came first, as shells report it; 0 if none came."""
    return 128 + self._signal if self._signal is not None else 0

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self._signal is None:
      self._signal = number
      # print() may not be re-entered from a handler; a plain write may.
      os.write(2, b"\nstopping at the next safe point; Ctrl-C once more exits at once\n")
    # Given back to the system, a second Ctrl-C also ends a process that is deep inside compiled code.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def graceful_shutdown() -> Iterator[Shutdown]:
  """Turns the first SIGINT or SIGTERM into a flag, so that a loop can save its state and leave.

  A second Ctrl-C ends the process at once. Repeated SIGTERMs, which batch schedulers send, do not. The handlers that
  were there before come back when the block ends. Outside the main thread, where Python allows no handlers, the flag
  stays false.

  Yields:
    A `Shutdown`; loops read `.requested` after each step.
  """
  shutdown = Shutdown()
  if threading.current_thread() is not threading.main_thread():
    yield shutdown
    return
  before = {number: signal.signal(number, shutdown._handle) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield shutdown
  finally:
    for number, handler in before.items():
      # None stands for a handler that was not installed from Python and cannot be put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
