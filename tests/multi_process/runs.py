"""Two processes of two CPU devices each, as a test starts, meets and ends them."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from tests.forked import Forked
from tests.processes import environment

PROCESSES = 2


def free_port() -> int:
  """A port that was free a moment ago."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


@contextlib.contextmanager
def started(
  target: Callable[[list[str]], int | None],
  arguments: Callable[[str, int], Sequence[str]],
  cache: pathlib.Path,
  logs: pathlib.Path,
) -> Iterator[list[Forked]]:
  """Two processes that call `target`, ended by force when the block ends.

  Args:
    target: the main function of a command.
    arguments: `(HOST:PORT, process id) -> arguments`.
    cache: for compiled programs.
    logs: folder for `log-0` and `log-1`.
  """
  logs.mkdir(parents=True, exist_ok=True)
  address = f"127.0.0.1:{free_port()}"
  caches = {"KWJAX_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": str(cache / "xla")}
  variables = environment(2, **caches, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1")
  running = []
  for index in range(PROCESSES):
    given = (list(arguments(address, index)),)
    running.append(Forked(target, given, logs / f"log-{index}", variables))
  try:
    yield running
  finally:
    for process in running:
      process.kill()
      process.wait()


def ended(running: Sequence[Forked], logs: pathlib.Path, seconds: float = 240.0) -> tuple[list[int], list[str]]:
  """Exit statuses and outputs; an overdue process is a failure."""
  deadline = time.monotonic() + seconds
  statuses = [process.wait(max(deadline - time.monotonic(), 0.1)) for process in running]
  return statuses, [(logs / f"log-{index}").read_text() for index in range(len(running))]


def wait_until(condition: Callable[[], bool], running: Sequence[Forked], seconds: float = 120.0) -> None:
  """Returns once the condition holds; fails when a process has ended before, or the time is over."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "the moment that the test waits for did not come"
    assert all(process.poll() is None for process in running), "a process ended before that moment"
    time.sleep(0.02)
