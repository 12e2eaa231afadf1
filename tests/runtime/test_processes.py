"""How a run of several processes is recognised and watched; real runs of two are in tests/multi_process."""

from __future__ import annotations

import concurrent.futures
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from kwjax.errors import KwjaxError
from kwjax.runtime.devices import launchers, processes, watch

LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
  """What `jax.distributed.initialize` is called with, in its place; no launcher's variables, no settings changed."""
  found: list[tuple] = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **options: found.append(arguments))
  monkeypatch.setattr(jax.config, "update", lambda *arguments: None)
  for name in LAUNCHERS:
    monkeypatch.delenv(name, raising=False)
  return found


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("h:1", None, None), "belong together: --num-processes, --process-id missing"),
    ((None, 2, 0), "belong together: --coordinator missing"),
    (("h", 2, 0), "HOST:PORT"),
    ((":80", 2, 0), "HOST:PORT"),
    (("h:x", 2, 0), "HOST:PORT"),
    (("h:70000", 2, 0), "HOST:PORT"),
    (("h:1", 0, 0), "--num-processes must be at least 1, found 0"),
    (("h:1", 2, 2), "below --num-processes 2, found 2"),
    (("h:1", 2, -1), "at least 0 and below --num-processes 2, found -1"),
  ],
)
def test_bad_combinations_are_refused(calls: list[tuple], arguments: tuple, message: str) -> None:
  with pytest.raises(KwjaxError, match=message):
    processes.initialize(*arguments)
  assert not calls


def test_a_plain_process_does_nothing(calls: list[tuple]) -> None:
  processes.initialize()
  processes.initialize("h:1", 1, 0)
  assert not calls
  assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
  assert processes.exchange({"a": 1}) == [{"a": 1}]
  assert processes.from_main(lambda: 3) == 3
  assert processes.share(7) == range(7)
  rows = np.arange(6).reshape(3, 2)
  assert processes.gather(rows) is rows


def test_given_values_are_used(calls: list[tuple]) -> None:
  processes.initialize("[::1]:1234", 4, 3)
  assert calls == [("[::1]:1234", 4, 3)]


@pytest.mark.parametrize(
  ("name", "value", "several"),
  [
    ("SLURM_STEP_NUM_TASKS", "2", True),
    ("SLURM_STEP_NUM_TASKS", "1", False),
    ("SLURM_NTASKS", "8", False),  # a batch script outside srun
    ("OMPI_COMM_WORLD_SIZE", "4", True),
    ("TPU_WORKER_HOSTNAMES", "a,b", True),
    ("TPU_WORKER_HOSTNAMES", "localhost", False),
  ],
)
def test_launchers_are_recognised(
  calls: list[tuple], monkeypatch: pytest.MonkeyPatch, name: str, value: str, several: bool
) -> None:
  monkeypatch.setenv(name, value)
  processes.initialize()
  assert calls == ([(None, None, None)] if several else [])


def test_a_refusal_of_jax_is_one_sentence(calls: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
  def fail(*arguments: object, **options: object) -> None:
    raise RuntimeError("should only be called once\nmore")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(KwjaxError, match=r"named by these options at h:1: should only be called once$"):
    processes.initialize("h:1", 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_who_does_not_come_is_missed(index: int) -> None:
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  start = "from kwjax.runtime.devices import processes as p; p._START_SECONDS = 2"
  code = f"{start}; p.initialize({address!r}, 2, {index})"
  ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert ended.returncode == 2
  assert f"error: the processes named by these options at {address} did not all come within 2 s" in ended.stderr


def test_a_stranger_is_not_taken_for_a_process() -> None:
  listener, (port, token) = watch.listen()
  found: dict[int, socket.socket] = {}
  thread = threading.Thread(target=lambda: found.update(watch.accept(listener, token, 2)))
  thread.start()
  watch.connect(["127.0.0.1"], port, "a guess", 1)
  mine = watch.connect(["127.0.0.1"], port, token, 1)
  thread.join(20)
  assert list(found) == [1]
  mine[0].close()
  found[1].close()


def test_values_reach_all_in_order_however_long_they_are() -> None:
  listener, (port, token) = watch.listen()
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    # A first host that refuses: the second one is used.
    joined = [pool.submit(watch.connect, ["127.0.0.1.invalid", "127.0.0.1"], port, token, i) for i in (1, 2)]
    ends = [watch.accept(listener, token, 3), *(one.result() for one in joined)]
    watches = [watch.Watch(i, 3, end) for i, end in enumerate(ends)]

    def rounds(process: int) -> list[list[str]]:
      return [watches[process].exchange(f'"{process} of round {n} {"x" * size}"') for n, size in ((0, 0), (1, 1 << 20))]

    found = [task.result(60) for task in [pool.submit(rounds, i) for i in (2, 0, 1)]]
  expected = [[f'"{i} of round {n} {"x" * size}"' for i in range(3)] for n, size in ((0, 0), (1, 1 << 20))]
  assert found == [expected] * 3
  for one in watches[::-1]:
    one.say_goodbye()


def test_a_process_zero_that_is_nowhere_is_named_with_what_was_tried() -> None:
  with pytest.raises(KwjaxError, match=r"^process 1 cannot reach process 0 at 127\.0\.0\.1:1: .*refused"):
    watch.connect(["127.0.0.1"], 1, "token", 1)


@pytest.mark.parametrize(
  ("vendors", "library", "several"),
  [(["0x8086", "0x1ae0"], True, True), (["0x1ae0"], False, False), (["0x8086"], True, False)],
)
def test_a_cloud_tpu_is_one_with_chips_and_their_library(
  calls: list[tuple],
  monkeypatch: pytest.MonkeyPatch,
  tmp_path: pathlib.Path,
  vendors: list[str],
  library: bool,
  several: bool,
) -> None:
  for i, vendor in enumerate(vendors):
    (tmp_path / f"device{i}").mkdir()
    (tmp_path / f"device{i}" / "vendor").write_text(f"{vendor}\n")
  monkeypatch.setattr(launchers, "_PCI_DEVICES", tmp_path)
  monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  if library:
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/libtpu.so")
  processes.initialize()
  assert calls == ([(None, None, None)] if several else [])


_PROCESS = """
import os, socket, sys, time
from kwjax.runtime.devices import watch
if "QUICK" in os.environ:
  watch._BEAT_SECONDS, watch._SILENCE_SECONDS = 0.5, 6.0
index, port, count, last = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if index == 0:
  listener, (port, token) = watch.listen()
  print(port, token, flush=True)
  peers = watch.accept(listener, token, count)
else:
  peers = watch.connect(["127.0.0.1"], port, sys.argv[5], index)
w = watch.Watch(index, count, peers)
print("watching", flush=True)
sys.stdin.readline()
if last == "stop":
  w.announce_stop()
if last in ("bye", "stop"):
  w.say_goodbye()
if last == "failed":
  w.say_failed()
  sys.exit(2)
if last == "wait":
  deadline = time.monotonic() + 20
  while time.monotonic() < deadline and not w.stop_announced: time.sleep(0.05)
  print("stop announced", w.stop_announced)
  w.say_goodbye()
time.sleep(0.2)
"""


def _start(*arguments: object) -> subprocess.Popen:
  command = [sys.executable, "-c", _PROCESS, *map(str, arguments)]
  return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "silent", "failed", "stop", "bye"])
def test_what_one_of_three_does_reaches_the_others(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
  last = how if how in ("failed", "stop") else "bye"
  if how == "silent":
    monkeypatch.setenv("QUICK", "1")
  rest = "bye" if how == "bye" else "wait"
  first = _start(0, 0, 3, rest)
  assert first.stdout is not None
  port, token = first.stdout.readline().split()
  others = [_start(1, port, 3, last, token), _start(2, port, 3, rest, token)]
  everybody = [first, *others]
  try:
    for process in everybody:
      assert process.stdout is not None
      assert process.stdout.readline() == "watching\n"
    start = time.monotonic()
    if how == "killed":
      others[0].kill()
    if how == "silent":
      others[0].send_signal(signal.SIGSTOP)
    asked = [first, others[1]] if how == "silent" else [others[0], first, others[1]]
    ends = [process.communicate("\n", timeout=60) for process in asked]
    assert time.monotonic() - start < 50
  finally:
    for process in everybody:
      process.kill()
  statuses = [first.returncode, others[1].returncode]
  texts = ends[-2:]
  if how in ("stop", "bye"):
    assert statuses == [0, 0]
    assert all(("stop announced True" in out) == (how == "stop") for out, _ in texts)
    return
  what = {"killed": "is gone", "silent": "no longer answers", "failed": "has stopped with an error"}[how]
  assert statuses == [watch.GONE_STATUS] * 2
  assert all(f"error: process 1 of 3 {what}" in err for _, err in texts)
