"""Every mistake a user can make: one clear sentence, exit status 2, nothing written, no traceback."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import PIL.Image
import pytest

from experiments import cifar_bns
from kwjax.runtime.devices import memory
from tests import networks
from tests.end_to_end import jobs
from tests.end_to_end.bad_inputs import ARCH, CASES, state_dict, stored, with_leaf
from tests.weights_conversion import checkpoint_files as written
from weights_conversion.convert import convert


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
  """A good network and good data, and a compilation cache of the tests' own."""
  folder = tmp_path_factory.mktemp("inputs")
  jobs.save_inputs(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("KWJAX_CACHE", str(folder / "cache"))
    yield folder


def command_line(inputs: pathlib.Path, folder: pathlib.Path, more: list[str]) -> list[str]:
  """The good command line with the bad options in place of its own."""
  good = {"--network": str(inputs / "network"), "--preset": "smoke", "--workdir": str(folder / "run")}
  if more[:1] in (["--arch"], []):
    del good["--network"]
  return [text for name, value in good.items() if name not in more for text in (name, value)] + more


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_status_2(
  inputs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
  case, message = CASES[name]
  more = case(tmp_path)
  if name == "both networks":
    more = ["--network", str(inputs / "network"), *more[2:]]
  assert cifar_bns.main(command_line(inputs, tmp_path, more)) == 2
  captured = capsys.readouterr()
  lines = captured.err.splitlines()
  assert captured.out == ""
  assert len(lines) == 1, captured.err
  assert lines[0].startswith("error: ")
  assert re.search(message, lines[0]), lines[0]
  assert not (tmp_path / "run").exists()
  assert not (tmp_path / "it_ran").exists()


def test_without_batch_norm_there_are_no_statistics(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  network = networks.tiny_network(batch_norm=False)
  monkeypatch.setattr("kwjax.cli.compress.get_network", lambda *named, default: network)
  assert cifar_bns.main(["--preset", "smoke", "--workdir", str(tmp_path / "run")]) == 2
  assert re.search(r"error: .*tiny.* BatchNorm", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.slow
def test_a_channel_that_never_varied_is_no_mistake(inputs: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """PyTorch checkpoints hold variances of zero for dead channels; a negative one is refused, see above."""

  def dead(array: jax.Array) -> jax.Array:
    return array.at[:3].set(0.0)

  more = stored(with_leaf("batch_stats/bn1/var", dead))(tmp_path)
  assert cifar_bns.main(command_line(inputs, tmp_path, more)) == 0
  report = json.loads((tmp_path / "run" / "report.json").read_text())
  assert all(np.isfinite(value) for value in report["jkl"]["per_layer"].values())
  arrays = state_dict()
  arrays["bn1.running_var"][:3] = 0.0
  path = written.save_state_dict(tmp_path / "weights.pth", arrays)
  assert convert(ARCH, path).variables["batch_stats"]["bn1"]["var"][2] == 0.0


def test_dry_run_predicts_that_memory_does_not_suffice(
  inputs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  more = ["--images", "200000", "--batch-size", "200000", "--dry-run"]
  monkeypatch.setattr(memory, "available_on_host", lambda: 1 << 30)
  assert cifar_bns.main(command_line(inputs, tmp_path, more)) == 2
  captured = capsys.readouterr()
  assert re.search(r"memory +about [0-9.]+ GiB on a device", captured.out)
  assert re.search("error: this run needs about [0-9.]+ GiB of memory, the machine has 1.0 GiB left", captured.err)
  monkeypatch.setattr(memory, "available_on_host", lambda: 1 << 50)
  assert cifar_bns.main(command_line(inputs, tmp_path, more)) == 0


@pytest.mark.parametrize(
  ("line", "folder", "limit", "used"),
  [
    ("0::/jobs/mine", "jobs", "memory.max", "memory.current"),
    ("4:memory:/jobs/mine", "memory/jobs/mine", "memory.limit_in_bytes", "memory.usage_in_bytes"),
  ],
)
def test_memory_left_is_that_of_the_smallest_control_group(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, line: str, folder: str, limit: str, used: str
) -> None:
  (tmp_path / "own").write_text(f"3:cpu:/\n{line}\n")
  monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
  monkeypatch.setattr(memory, "_CGROUP", tmp_path)
  (tmp_path / folder).mkdir(parents=True)
  machine = memory.available_on_host()
  assert machine is not None
  assert machine > 3_000_000
  (tmp_path / folder / limit).write_text("5000000\n")
  (tmp_path / folder / used).write_text("2000000\n")
  assert memory.available_on_host() == 3_000_000
  (tmp_path / folder / limit).write_text("max\n")
  assert memory.available_on_host() > 3_000_000


@contextlib.contextmanager
def permissions_hold() -> Iterator[None]:
  """The system refuses this thread what permissions forbid, even where it runs as root."""
  if os.geteuid() != 0:
    yield
    return
  libc = ctypes.CDLL(None, use_errno=True)
  if not hasattr(libc, "capset"):
    pytest.skip("root may read and write everything, and only Linux lets it give that up")
  version_3_of_this_thread = (ctypes.c_uint32 * 2)(0x20080522, 0)
  before, less = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
  assert libc.capget(version_3_of_this_thread, before) == 0
  less[:] = before
  less[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of the effective ones
  assert libc.capset(version_3_of_this_thread, less) == 0
  try:
    yield
  finally:
    assert libc.capset(version_3_of_this_thread, before) == 0


@pytest.mark.parametrize(
  ("option", "name"),
  [("network", "locked/x"), ("workdir", "locked/x"), ("eval-data", "locked/x"), ("eval-data", "locked")],
)
def test_a_folder_without_permission(
  inputs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], option: str, name: str
) -> None:
  locked = tmp_path / "locked"
  locked.mkdir(mode=0)
  try:
    with permissions_hold():
      assert cifar_bns.main(command_line(inputs, tmp_path, [f"--{option}", str(tmp_path / name)])) == 2
  finally:
    locked.chmod(0o700)
  captured = capsys.readouterr()
  assert captured.out == ""
  (line,) = captured.err.splitlines()
  assert re.match(rf"error: .*{re.escape(str(locked))}", line), line
  assert "Permission denied" in line
  assert not list(locked.iterdir())
  assert not (tmp_path / "run").exists()


def test_a_class_folder_without_permission_shifts_no_labels(
  inputs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  for name in ("cat", "dog"):
    (tmp_path / "data" / name).mkdir(parents=True)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
  scan = os.scandir

  def refuse(place: Any = ".") -> Any:  # root may read everything, so the system does not refuse here
    if str(place).endswith("cat"):
      raise PermissionError(errno.EACCES, "Permission denied", str(place))
    return scan(place)

  monkeypatch.setattr(os, "scandir", refuse)
  assert cifar_bns.main(command_line(inputs, tmp_path, ["--eval-data", str(tmp_path / "data")])) == 2
  assert f"cannot read {tmp_path / 'data' / 'cat'}: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
  "more", [["--preset", "huge"], ["--scheme", "magic"], ["--steps", "many"], ["--colour", "red"]]
)
def test_a_wrong_command_line_is_explained(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit) as stop:
    cifar_bns.main(more)
  assert stop.value.code == 2
  captured = capsys.readouterr()
  assert more[-1] in captured.out + captured.err or more[0] in captured.out + captured.err
  assert "Traceback" not in captured.err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hostile pickle", "33 bits", "batch larger than memory"])
def test_the_same_from_a_shell(inputs: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
  case, message = CASES[name]
  command = [sys.executable, "-m", "experiments.cifar_bns", *command_line(inputs, tmp_path, case(tmp_path))]
  done = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr), done.stderr
