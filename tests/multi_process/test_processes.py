"""Two processes compute what one does, end together when one ends, and go on together."""

from __future__ import annotations

import pathlib
import signal
import time

import numpy as np
import pytest

from kwjax.runtime.files import read_json
from tests.multi_process import worker
from tests.multi_process.runs import ended, started, wait_until

STEPS = 250


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Compiled programs, kept from test to test."""
  return tmp_path_factory.mktemp("cache")


def run(mode: str, folder: pathlib.Path, cache: pathlib.Path):
  """Both processes of the worker."""
  folder.mkdir(exist_ok=True)
  arguments = lambda address, index: [mode, str(folder), str(STEPS), address, "2", str(index)]
  return started(worker.run, arguments, cache, folder / "logs")


def finish(mode: str, folder: pathlib.Path, cache: pathlib.Path) -> None:
  with run(mode, folder, cache) as running:
    statuses, outputs = ended(running, folder / "logs")
  assert statuses == [0, 0], outputs


def folder_of(folder: pathlib.Path, process: int) -> pathlib.Path | None:
  """Where a process keeps the states of the first batch."""
  return next((folder / "images" / "checkpoints").glob(f"batch-00000.process-{process}.*"), None)


def newest_step(folder: pathlib.Path, process: int) -> int:
  """The newest state of the first batch that a process has stored, or 0."""
  found = folder_of(folder, process)
  return max((int(step.name) for step in found.iterdir() if step.name.isdecimal()), default=0) if found else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path) -> pathlib.Path:
  """The folder of a run of two processes that nothing disturbed."""
  folder = tmp_path_factory.mktemp("undisturbed")
  finish("numbers", folder, cache)
  return folder


@pytest.mark.slow
def test_numbers_are_those_of_one_process(undisturbed: pathlib.Path) -> None:
  alone = worker.numbers(1)
  both = [np.load(undisturbed / f"numbers-{index}.npz") for index in range(2)]
  for name, expected in alone.items():
    np.testing.assert_array_equal(both[0][name], both[1][name], err_msg=name)
    # Adam's first steps divide by gradients that may be tiny.
    tolerance = 1e-4 if "images" in name else 1e-5
    differs = np.abs(both[0][name] - expected) > tolerance * np.abs(expected).max()
    # A weight between two levels may be rounded the other way.
    assert differs.mean() <= (0.02 if name == "reconstructed" else 0.0), (name, int(differs.sum()), differs.size)


@pytest.mark.slow
def test_each_process_stores_its_share_and_reads_all(undisturbed: pathlib.Path) -> None:
  images = [np.load(undisturbed / f"images-{index}.npy") for index in range(2)]
  np.testing.assert_array_equal(*images)
  manifest = read_json(undisturbed / "images" / "images" / "manifest.json")
  # Batches of 4 and 3 images over four devices, two a process.
  assert [[part["count"] for part in entry["parts"]] for entry in manifest["shards"].values()] == [[2, 2], [2, 1]]
  assert not (undisturbed / "images" / "checkpoints").exists()


@pytest.mark.slow
def test_killed_stopped_and_damaged_it_ends_with_the_same_images(
  tmp_path: pathlib.Path, cache: pathlib.Path, undisturbed: pathlib.Path
) -> None:
  for victim, step in ((1, 10), (0, 30)):
    with run("images", tmp_path, cache) as running:
      wait_until(lambda: newest_step(tmp_path, victim) >= step, running)
      running[victim].send_signal(signal.SIGKILL)
      killed = time.monotonic()
      statuses, outputs = ended(running, tmp_path / "logs", 60)
    assert time.monotonic() - killed < 60
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] not in (0, -signal.SIGKILL)
    assert (
      f"error: process {victim} of 2 is gone; start all again with the same command to resume" in outputs[1 - victim]
    )

  reached = min(newest_step(tmp_path, index) for index in range(2))
  with run("images", tmp_path, cache) as running:
    wait_until(lambda: min(newest_step(tmp_path, index) for index in range(2)) > reached, running)
    running[1].send_signal(signal.SIGTERM)
    statuses, outputs = ended(running, tmp_path / "logs", 60)
  # One was asked; both have stopped at the same step and saved it.
  assert 0 not in statuses, outputs
  stopped = [int(output.split("stopped at step ")[1].split(" ")[0]) for output in outputs]
  assert stopped[0] == stopped[1] == newest_step(tmp_path, 0) == newest_step(tmp_path, 1)

  for path in (folder_of(tmp_path, 1) / str(stopped[0])).rglob("*"):
    if path.is_file() and path.stat().st_size > 200:
      path.write_bytes(path.read_bytes()[:-50])
  finish("images", tmp_path, cache)
  np.testing.assert_array_equal(np.load(tmp_path / "images-0.npy"), np.load(undisturbed / "images-0.npy"))


def test_a_folder_in_use_stops_all(tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
  from kwjax.runtime.workdir import lock_workdir

  with lock_workdir(tmp_path / "images"), run("images", tmp_path, cache) as running:
    statuses, outputs = ended(running, tmp_path / "logs", 120)
  assert statuses == [2, 2]
  assert all("in use by process" in output for output in outputs)


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
  def arguments(address: str, index: int) -> list[str]:
    return ["images", str(tmp_path / f"host-{index}"), str(STEPS), address, "2", str(index)]

  with started(worker.run, arguments, cache, tmp_path / "logs") as running:
    statuses, outputs = ended(running, tmp_path / "logs", 120)
  assert statuses == [2, 2]
  assert all("error: process 1 of 2 does not see what process 0 wrote to" in output for output in outputs), outputs
