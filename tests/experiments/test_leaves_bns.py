"""Starting points and noise as calibration set at the smallest size; ranges under current statistics, exactly."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.noise import leaves_bns
from experiments.noise.leaves_bns import step_counts
from kwjax import intercept
from kwjax.batchnorm import adjust_statistics, observing
from kwjax.quantization import observe_ranges
from kwjax.quantization.extremes import recording_extremes
from kwjax.runtime.files import read_sealed_json
from kwjax.synthesis import dead_leaves
from tests.experiments.tiny_study import command, tiny_network_loaded, write_noise
from tests.networks import tiny_network


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A tiny network as the one that is loaded, and data."""
  write_noise(tmp_path / "data.npz", "train", "test")
  with tiny_network_loaded():
    yield tmp_path


@pytest.mark.slow
def test_all_cells_are_filled(folder: pathlib.Path) -> None:
  data = ["--eval-data", f"{folder / 'data.npz'}:test", "--real-data", f"{folder / 'data.npz'}:train", "--steps", "1"]
  assert leaves_bns.main(command(folder, *data)) == 0
  report = json.loads((folder / "run" / "report.json").read_text())
  jkl, accuracy, sources, tuned = report["tables"]
  assert jkl["columns"] == accuracy["columns"] == ["1"]
  for table in report["tables"]:
    assert all(cell["mean"] is not None for row in table["cells"].values() for cell in row.values())
  # Equal images of equal steps: the default of the third table is that of the second one.
  assert sources["cells"]["bns"]["4w4a"]["mean"] == accuracy["cells"]["dead_leaves"]["1"]["mean"]
  # Extra data changes what is fine-tuned, not what is calibrated.
  plain, mixed = tuned["cells"]["bns"], tuned["cells"]["bns+dead_leaves"]
  assert plain["calibrated"]["mean"] == mixed["calibrated"]["mean"]
  assert "the first 4 of 4 bns images" in plain["fine-tuned"]["protocol"]
  assert "the first 8 for 2 steps" in mixed["fine-tuned"]["protocol"]
  assert len({jkl["cells"][start]["1"]["mean"] for start in ("randn", "uniform", "dead_leaves")}) == 3
  assert report["calibrated"]["4w4a*"]["gaussian-current"]["seeds"] == [0]
  names = {path.name for path in (folder / "run" / "figures").iterdir()}
  assert {"jkl.png", "images.png"} <= names
  stored = list((folder / "run" / "stages" / "ranges").glob("bns+dead_leaves*-8.json"))
  assert len(stored) == 1  # all of both halves
  # The ranges of the last rows were measured under the statistics of the noise.
  (path,) = (folder / "run" / "stages" / "current_ranges").glob("dead_leaves*.json")
  table = read_sealed_json(path)["result"]
  images = dead_leaves(jax.random.fold_in(jax.random.key(0), 1), 4, (8, 8, 3))
  low, high = extremes_under_current_statistics(images)["conv1"]
  np.testing.assert_allclose(np.asarray(table["conv1"][1]), high, rtol=1e-4)
  np.testing.assert_allclose(np.asarray(table["conv1"][0]), low, atol=1e-4)


def extremes_under_current_statistics(images: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Of every image, all in one batch whose statistics every BatchNorm layer uses."""
  network = tiny_network()
  apply = recording_extremes(observing(network.forward, current=(".*",)), network)
  _, mutated = apply(network.variables, jnp.asarray(images))
  return {layer: calls[0] for layer, calls in intercept.collect(mutated, "extremes").items()}


def test_a_copy_with_adjusted_statistics_is_the_network_under_current_ones() -> None:
  images = np.asarray(jax.random.normal(jax.random.key(5), (6, 8, 8, 3)))
  expected = extremes_under_current_statistics(images)
  adjusted = adjust_statistics(tiny_network(), images, batch_size=6)
  table = observe_ranges(adjusted, images, batch_size=2)
  plain = observe_ranges(tiny_network(), images)
  for layer, (low, high) in table.items():
    np.testing.assert_allclose(low, expected[layer][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(high, expected[layer][1], rtol=1e-4, atol=1e-5)
  assert np.abs(np.asarray(plain["fc"][1]) - np.asarray(table["fc"][1])).max() > 0.05


def test_steps_are_halved_three_times() -> None:
  assert step_counts(200) == (25, 50, 100, 200)
  assert step_counts(3) == (1, 3)


def test_bad_options_are_one_sentence(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  assert leaves_bns.main(command(folder, "--steps", "0")) == 2
  assert leaves_bns.main(command(folder, "--images", "1")) == 2
  assert leaves_bns.main(command(folder, "--rows", "bns")) == 2
  errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
  assert "--steps must be at least 1, found 0" in errors[0]
  assert "--images must be at least 2, two a device, found 1" in errors[1]
  assert "--eval-data" in errors[2]
