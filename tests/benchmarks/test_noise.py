"""The benchmark of noise: what it writes, and a rate that is images by seconds."""

from __future__ import annotations

import json
import pathlib
import time

import jax
import pytest

from benchmarks import noise


def test_a_rate_is_images_by_seconds() -> None:
  calls = []

  def make() -> jax.Array:
    calls.append(time.perf_counter())
    time.sleep(0.05)
    return jax.numpy.zeros(1)

  found = noise.rate(make, count=10, repeats=3)
  assert len(calls) == 4  # one to warm up
  assert 0 < found <= 10 / 0.05


def test_figures_are_written(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  file = tmp_path / "figures.json"
  assert noise.main(["--image-size", "6", "--count", "4", "--repeats", "1", "--json", str(file)]) == 0
  found = json.loads(file.read_text())
  assert all(rate > 0 for rate in found["images_per_second"].values())
  assert "dead leaves, one device" in capsys.readouterr().out
  with pytest.raises(SystemExit) as stop:
    noise.main(["--count", "0"])
  assert stop.value.code == 2
