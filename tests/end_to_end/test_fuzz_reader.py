"""A few seconds of what `fuzz_reader` does for hours, with the memory watched and every failure made small."""

from __future__ import annotations

import pathlib
import random
import subprocess
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weights_conversion.pickle_reader
from tests.end_to_end import fuzz_reader, jobs
from weights_conversion.tensors import MAX_EXPANSION, MIN_BUDGET_BYTES

# What a file of a few kilobytes may be expanded to, and as much again for its copy in another byte order or type.
MOST_BYTES = 3 * (MIN_BUDGET_BYTES + MAX_EXPANSION * 100_000)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, bytes]]:
  folder = tmp_path_factory.mktemp("fuzz")
  return folder, fuzz_reader.valid_files(folder)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moments=st.randoms(use_true_random=False))
def test_almost_right_files_are_read_or_refused(
  valid: tuple[pathlib.Path, dict[str, bytes]], moments: random.Random
) -> None:
  folder, contents = valid
  fuzz_reader.example(moments, contents, folder)


def test_almost_right_files_take_no_more_memory_than_their_size_explains(
  valid: tuple[pathlib.Path, dict[str, bytes]],
) -> None:
  folder, contents = valid
  # JAX keeps what it has traced, for at most these sizes of images; the readers of files are what is watched here.
  contents = {kind: content for kind, content in contents.items() if kind not in ("weights", "description")}
  for number in range(300):
    tracemalloc.start()
    try:
      fuzz_reader.example(random.Random(number), contents, folder)
      peak = tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()
    assert peak < MOST_BYTES, f"example {number} took {peak:,} bytes"


def test_the_harness_finds_a_reader_that_is_broken(
  valid: tuple[pathlib.Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
  def unchecked(key: Any, where: str) -> Any:
    return key

  monkeypatch.setattr(weights_conversion.pickle_reader, "scalar_key", unchecked)
  folder, contents = valid
  contents = {"legacy": contents["legacy"]}
  found = set()
  for number in range(800):
    try:
      fuzz_reader.example(random.Random(number), contents, folder)
    except TypeError as error:
      found.add(str(error))
  assert any("unhashable" in text for text in found)


@pytest.mark.slow
def test_the_long_run_as_a_command(tmp_path: pathlib.Path) -> None:
  command = [
    sys.executable,
    "-m",
    "tests.end_to_end.fuzz_reader",
    "--minutes",
    "0.05",
    "--keep",
    str(tmp_path / "found"),
  ]
  done = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "0 kinds of failure" in done.stdout
  assert not (tmp_path / "found").exists()
