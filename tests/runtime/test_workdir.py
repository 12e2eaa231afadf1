"""The folder lock and the orderly stop, each with real processes and signals."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from kwjax.errors import KwjaxError
from kwjax.runtime.workdir import graceful_shutdown, lock_workdir

_HOLD = """
import sys
from kwjax.runtime.workdir import lock_workdir
with lock_workdir(sys.argv[1]):
  print("locked", flush=True)
  sys.stdin.read()
"""

_LOOP = """
import time
from kwjax.runtime.workdir import graceful_shutdown
with graceful_shutdown() as shutdown:
  print("running", flush=True)
  while not shutdown.requested:
    time.sleep(.01)
  print("saved", flush=True)
  if {stay}:
    while True:
      time.sleep(.01)
raise SystemExit(shutdown.exit_status)
"""


def _start(code: str, *arguments: str) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [sys.executable, "-c", code, *arguments],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _line(process: subprocess.Popen[str]) -> str:
  assert process.stdout is not None
  return process.stdout.readline().strip()


def test_a_second_process_is_refused_by_name_and_a_killed_owner_leaves_no_lock(tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "run"
  with _start(_HOLD, str(folder)) as owner:
    try:
      assert _line(owner) == "locked"
      with pytest.raises(KwjaxError, match=rf"run is in use by process {owner.pid} on "), lock_workdir(folder):
        pass
    finally:
      owner.kill()
  with lock_workdir(folder) as held:
    assert held == folder
  with lock_workdir(folder):
    pass


def test_the_lock_ends_with_an_exception(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ZeroDivisionError), lock_workdir(tmp_path):
    1 / 0
  with lock_workdir(tmp_path):
    pass


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: pathlib.Path) -> None:
  (tmp_path / "file").write_text("")
  with pytest.raises(KwjaxError, match=r"cannot use .*file as working folder"), lock_workdir(tmp_path / "file"):
    pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_loop_save_and_leave(number: signal.Signals) -> None:
  with _start(_LOOP.format(stay=False)) as process:
    assert _line(process) == "running"
    process.send_signal(number)
    assert _line(process) == "saved"
    assert process.wait(60) == 128 + number


def test_a_second_interrupt_ends_the_process_at_once() -> None:
  with _start(_LOOP.format(stay=True)) as process:
    assert _line(process) == "running"
    process.send_signal(signal.SIGINT)
    assert _line(process) == "saved"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT


def test_a_second_sigterm_does_not() -> None:
  with _start(_LOOP.format(stay=True)) as process:
    assert _line(process) == "running"
    process.send_signal(signal.SIGTERM)
    assert _line(process) == "saved"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(0.5)
    process.kill()


def test_the_handlers_before_come_back() -> None:
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with graceful_shutdown() as shutdown:
    assert signal.getsignal(signal.SIGINT) != before[0]
    os.kill(os.getpid(), signal.SIGTERM)
    assert shutdown.requested
  assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
  assert shutdown.exit_status == 143


def test_outside_the_main_thread_the_flag_stays_false() -> None:
  found = []

  def body() -> None:
    with graceful_shutdown() as shutdown:
      found.append(shutdown.requested)

  thread = threading.Thread(target=body)
  thread.start()
  thread.join()
  assert found == [False]
