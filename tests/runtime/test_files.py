"""Atomic files and the comparison of settings."""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from kwjax.errors import CheckpointError, KwjaxError
from kwjax.runtime import files

_FILL = """
import resource, signal, sys
from kwjax.runtime.files import atomic_write
from kwjax.errors import KwjaxError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
  atomic_write(sys.argv[1], b"x" * 5000)
except KwjaxError as error:
  print(error)
"""


def test_write_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "new" / "file.bin"
  assert files.atomic_write(path, b"first, longer") == path
  files.atomic_write(path, b"second")
  assert path.read_bytes() == b"second"
  assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]
  assert files.sha256_file(path) == hashlib.sha256(b"second").hexdigest()


def test_a_write_that_does_not_fit_keeps_the_earlier_file(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "file.bin"
  files.atomic_write(path, b"earlier")
  found = subprocess.run([sys.executable, "-c", _FILL, str(path)], capture_output=True, text=True, check=True)
  assert str(path) in found.stdout
  assert "unchanged" in found.stdout
  assert path.read_bytes() == b"earlier"
  assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_a_failure_before_the_rename_keeps_the_earlier_file(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  path = tmp_path / "file.bin"
  files.atomic_write(path, b"earlier")

  def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(files.os, "fsync", full)
  with pytest.raises(KwjaxError, match="No space left on device"):
    files.atomic_write(path, b"later")
  assert path.read_bytes() == b"earlier"


def test_json_round_trip_and_damage(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "a.json"
  files.write_json(path, {"a": np.float32(0.5), "b": np.arange(3), "c": (1, None), "d": pathlib.Path("x")})
  assert files.read_json(path) == {"a": 0.5, "b": [0, 1, 2], "c": [1, None], "d": "x"}
  with pytest.raises(ValueError, match="Out of range float"):
    files.write_json(path, {"a": float("nan")})
  path.write_text('{"a": 1')
  with pytest.raises(CheckpointError, match=r"a\.json is not valid JSON"):
    files.read_json(path)
  with pytest.raises(CheckpointError, match=r"cannot read .*b\.json"):
    files.read_json(tmp_path / "b.json")


def test_settings_differences_name_each_key_with_both_values() -> None:
  there = {"steps": 100, "term": {"beta": 1e-3, "kind": "kl"}, "shape": [3, 3], "gone": None, "nan": float("nan")}
  now = {"steps": 100, "term": {"beta": 1e-2, "kind": "kl"}, "shape": (3, 3), "seed": 1, "nan": float("nan")}
  assert files.settings_differences(there, now) == [
    "gone is null there and absent now",
    "seed is absent there and 1 now",
    "term.beta is 0.001 there and 0.01 now",
  ]
  assert files.settings_differences(there, dict(reversed(there.items()))) == []
  # 1 and True are equal in Python but are different settings.
  assert files.settings_differences({"a": 1}, {"a": True}) == ["a is 1 there and true now"]
  with pytest.raises(CheckpointError, match=r"run was made with other settings: a is 1 there and 2 now"):
    files.check_settings("run", {"a": 1}, {"a": 2})
