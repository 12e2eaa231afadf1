"""The toy problem: its points, why current statistics undo a shift and a scale, and students of a quick run."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.noise import toy_circles, toy_plane
from experiments.noise.toy_plane import Sizes, as_images, as_points, circles, grid_points, inputs, untrained
from kwjax.batchnorm import observe


def test_circles_are_where_they_are_said_to_be() -> None:
  points, labels = circles(0, 20_000)
  radii = np.linalg.norm(points, axis=1)
  for label, radius in enumerate(toy_plane.RADII):
    assert radii[labels == label].mean() == pytest.approx(radius, abs=0.005)
    assert radii[labels == label].std() == pytest.approx(toy_plane.THICKNESS, abs=0.005)
  assert abs(labels.mean() - 0.5) < 1e-9
  assert not np.allclose(points, circles(0, 20_000, held_out=True)[0])
  # The network's own normalization is that of the points.
  network = untrained(0, 0)
  images = as_images(points)
  np.testing.assert_allclose(images.mean((0, 1, 2)), network.input_mean, atol=0.002)
  np.testing.assert_allclose(images.std((0, 1, 2)), network.input_std, atol=0.002)
  np.testing.assert_allclose(as_points(images), points, atol=1e-6)


def test_the_grid_runs_from_below_and_from_the_left() -> None:
  points = grid_points().reshape(toy_plane.GRID, toy_plane.GRID, 2)
  assert (points[0, 0] < 0).all()
  assert points[0, -1, 0] == -points[0, 0, 0]
  assert points[-1, 0, 1] == -points[0, 0, 1]
  np.testing.assert_allclose(points.mean((0, 1)), 0, atol=1e-12)


@pytest.mark.parametrize("row", ["narrow", "wide", "shifted"])
def test_current_statistics_answer_moved_noise_like_the_noise_itself(row: str) -> None:
  network = untrained(3, 0)
  matched, moved = (jnp.asarray(inputs(name, network, 0, 256)) for name in ("matched", row))
  current = [observe(network, images, current=(".*",))[0] for images in (matched, moved)]
  np.testing.assert_allclose(current[1], current[0], atol=0.01)
  running = [network.apply(images) for images in (matched, moved)]
  assert np.abs(np.asarray(running[1] - running[0])).max() > 0.3


@pytest.mark.slow
def test_students_of_current_statistics_learn_from_narrow_noise(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv("KWJAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setitem(toy_circles._SIZES, "smoke", Sizes(512, 120, 150, 64))
  arguments = ["--preset", "smoke", "--rows", "narrow", "--workdir", str(tmp_path / "run")]
  assert toy_circles.main([*arguments, "--columns", "running-own"]) == 0
  assert toy_circles.main(arguments) == 0
  report = json.loads((tmp_path / "run" / "report.json").read_text())
  accuracy, agreement = (table["cells"]["narrow"] for table in report["tables"])
  assert report["float"]["top1"] > 0.97
  assert accuracy["current-readjusted"]["mean"] > 95
  # One class: half of the points, which are evenly many on both circles.
  assert accuracy["running-own"]["mean"] == pytest.approx(50, abs=5)
  assert accuracy["current-own"]["mean"] < 75
  assert agreement["current-readjusted"]["mean"] > 90
  assert agreement["running-own"]["mean"] < 50
  assert (tmp_path / "run" / "figures" / "regions.png").exists()


def test_options_of_networks_and_data_are_unknown(capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit):
    toy_circles.main(["--network", "folder"])
  assert "--network" in capsys.readouterr().err
