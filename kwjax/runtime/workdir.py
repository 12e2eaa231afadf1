"""One run, one folder: a lock against a second process, and an orderly end when the run is asked to stop."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import filelock

from kwjax.errors import KwjaxError
from kwjax.runtime.files import PathLike

_LOCK_NAME = ".lock"
_OWNER_NAME = ".lock-owner"  # beside the lock file, which filelock may empty
LOCK_FILES = frozenset({_LOCK_NAME, _OWNER_NAME})
"""Names of the files that a lock leaves in a folder."""


@contextlib.contextmanager
def lock_workdir(folder: PathLike) -> Iterator[pathlib.Path]:
  """Holds `folder` for this process alone until the block ends; the folder is made where there is none.

  The lock is one of the operating system, not the existence of a file: it ends with the process, so that a killed run
  leaves nothing to clean up. Of several processes of one run, only one may take it.

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
    lock = filelock.FileLock(folder / _LOCK_NAME, timeout=0, thread_local=False)
    lock.acquire()
  except filelock.Timeout:
    raise KwjaxError(
      f"{folder} is in use by process {_owner(folder)}: wait for it, stop it, or choose another working folder"
    ) from None
  except (OSError, NotImplementedError) as error:
    reason = "it is a file" if folder.is_file() else getattr(error, "strerror", None) or error
    raise KwjaxError(f"cannot use {folder} as working folder: {reason}") from error
  owner = folder / _OWNER_NAME
  try:
    with contextlib.suppress(OSError):  # only a message needs it
      owner.write_text(f"{os.getpid()} on {socket.gethostname()}\n")
    yield folder
  finally:
    with contextlib.suppress(OSError):
      owner.unlink(missing_ok=True)
    lock.release()


def _owner(folder: pathlib.Path) -> str:
  """Who has written its name beside the lock."""
  with contextlib.suppress(OSError):
    return (folder / _OWNER_NAME).read_text(errors="replace")[:300].strip() or "unknown"
  return "unknown"


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
