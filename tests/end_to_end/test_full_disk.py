"""A full disk at each stage: a clear error, nothing earlier lost, and the run goes on when there is space again."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from experiments import cifar_bns
from kwjax.runtime import files
from kwjax.runtime.checkpoint import Checkpoints
from kwjax.runtime.workdir import LOCK_FILES
from kwjax.synthesis.store import ImageStore
from tests.end_to_end import jobs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  folder = tmp_path_factory.mktemp("full_disk")
  jobs.save_inputs(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("KWJAX_CACHE", str(folder / "cache"))
    yield folder


def arguments(inputs: pathlib.Path, workdir: pathlib.Path) -> list[str]:
  # A checkpoint at every look at the synthesis, every ten steps.
  return jobs.arguments(inputs, workdir, steps=30, distill_steps=6, checkpoint_steps=2, checkpoint_seconds=0)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file system in memory that can be made larger with `resize`."""
  place = tmp_path / "disk"
  place.mkdir()
  if os.geteuid() != 0:
    pytest.skip("mounting a small tmpfs needs root")
  if subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=False, capture_output=True
  ).returncode:
    pytest.skip("this system lets nobody mount a tmpfs")
  try:
    yield place
  finally:
    subprocess.run(["umount", "-l", str(place)], check=True)


def resize(place: pathlib.Path, kilobytes: int) -> None:
  subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(place)], check=True)


def kept(workdir: pathlib.Path) -> dict[str, bytes]:
  """Finished results, which no later failure may touch; a shard is finished once its manifest names it."""
  found = [path for pattern in ("settings.json", "stages/*.json") for path in workdir.glob(pattern)]
  for manifest in workdir.glob("*/images/manifest.json"):
    shards = json.loads(manifest.read_text())["shards"].values()
    found += [manifest.parent / part["file"] for entry in shards for part in entry.get("parts", [entry])]
  return {str(path): path.read_bytes() for path in found}


@pytest.mark.slow
def test_space_runs_out_in_every_stage(
  inputs: pathlib.Path, tmp_path: pathlib.Path, small_disk: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  assert cifar_bns.main(arguments(inputs, tmp_path / "whole")) == 0
  expected = jobs.result(tmp_path / "whole")
  workdir, failed_in, before = small_disk / "run", [], {}
  capsys.readouterr()
  # Each time there is a little more space; the run gets a little further and stops, until there is enough.
  for kilobytes in (8, 24, *range(48, 6000, 48)):
    resize(small_disk, kilobytes)
    status = cifar_bns.main(arguments(inputs, workdir))
    said = capsys.readouterr().err
    after = kept(workdir)
    assert {name: after.get(name) for name in before} == before
    before = after
    if status == 0:
      break
    assert status == 2, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert os.strerror(errno.ENOSPC) in errors[0], errors[0]
    reached = [stage for stage, marker in jobs.MARKERS.items() if marker in said]
    failed_in.append(reached[-1])
  assert status == 0
  assert set(failed_in) >= {"synthesis", "distillation", "report"}, failed_in
  jobs.assert_same_result(workdir, expected)
  assert (workdir / "report.html").stat().st_size > 10_000


@contextlib.contextmanager
def no_space(patch: pytest.MonkeyPatch) -> Iterator[None]:
  """Flushing a file says that there is no space, as a full file system with delayed allocation does."""

  def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with patch.context() as inner:
    inner.setattr(files.os, "fsync", full)
    yield


def test_without_a_disk_to_fill_the_error_is_injected(
  inputs: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  workdir = tmp_path / "run"
  with no_space(monkeypatch):
    assert cifar_bns.main(arguments(inputs, workdir)) == 2
  errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1
  assert f"cannot write {workdir / 'settings.json'}" in errors[0]
  assert os.strerror(errno.ENOSPC) in errors[0]
  assert {p.name for p in workdir.iterdir()} <= LOCK_FILES


def test_images_and_checkpoints_before_are_kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  store = ImageStore(tmp_path / "images", settings={})
  images, labels = np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, np.int32)
  store.write(0, images, labels)
  with no_space(monkeypatch), pytest.raises(files.KwjaxError, match="No space left"):
    store.write(1, images, labels)
  assert (store.indices(), store.damaged()) == ([0], [])


_LIMITED = """
import resource, signal, sys
import numpy as np
from kwjax.errors import CheckpointError
from kwjax.runtime.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Checkpoints(sys.argv[1]) as checkpoints:
  state = {"a": np.random.default_rng(0).random(200_000)}
  checkpoints.save(1, state, settings={})
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
  try:
    checkpoints.save(2, {"a": state["a"] + 1}, settings={})
  except CheckpointError as error:
    print(error)
"""


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: pathlib.Path) -> None:
  """A limit on the size of files stands in for the disk where nothing can be mounted."""
  command = [sys.executable, "-c", _LIMITED, str(tmp_path)]
  done = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, check=True)
  assert f"cannot save step 2 in {tmp_path}: " in done.stdout
  assert "earlier steps are unchanged: [1]" in done.stdout
  state = {"a": np.random.default_rng(0).random(200_000)}
  with Checkpoints(tmp_path) as checkpoints:
    found = checkpoints.restore(state, settings={})
  assert found is not None
  assert found.step == 1
  np.testing.assert_array_equal(found.state["a"], state["a"])
