"""Figures of activations and of decision regions: densities, positions and colours, refused input."""

from __future__ import annotations

import pathlib

import numpy as np
import PIL.Image
import pytest

from kwjax.analysis import activation_figures
from kwjax.analysis.activation_figures import DepthCurve, depth_curves, distribution_panels, some_layers
from kwjax.analysis.region_figures import RegionPanel, region_panels
from kwjax.errors import KwjaxError

EDGES = np.linspace(-6, 6, 13)
COUNTS = [2, *range(12), 3]


def size_of(path: pathlib.Path) -> tuple[int, int]:
  with PIL.Image.open(path) as image:
    return image.size


def test_a_density_integrates_to_the_share_inside_the_bins() -> None:
  found = activation_figures._density(COUNTS, EDGES, "")
  assert (found * np.diff(EDGES)).sum() == pytest.approx(66 / 71)
  assert found[4] == pytest.approx(4 / 71)


def test_some_layers_are_spread_from_the_first_to_the_last() -> None:
  layers = [f"bn{i}" for i in range(43)]
  found = some_layers(layers, 4)
  assert found == ["bn0", "bn14", "bn28", "bn42"]
  assert some_layers(layers[:3], 4) == layers[:3]


@pytest.mark.parametrize("number", [1, 3, 5])
def test_panels_of_any_number_of_layers(tmp_path: pathlib.Path, number: int) -> None:
  panels = {f"layer${i}": {"real": COUNTS, "noise": COUNTS[::-1]} for i in range(number)}
  path = distribution_panels(panels, EDGES, tmp_path / "new" / "a.png", filled="real", xlabel="x")
  width, height = size_of(path)
  assert width >= 500
  assert height >= 300


def test_depth_curves_are_drawn_with_gaps_and_single_points(tmp_path: pathlib.Path) -> None:
  panels = {"KL": {"a": DepthCurve([0.1, 0.0, 10.0], 0), "b": DepthCurve([0.2], 1, dashed=True)}, "spread": {}}
  assert size_of(depth_curves(panels, tmp_path / "a.png"))[0] > 1000


def test_what_cannot_be_drawn_is_refused(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "a.png"
  with pytest.raises(KwjaxError, match="no distributions"):
    distribution_panels({}, EDGES, path)
  with pytest.raises(KwjaxError, match=r"noise, bn0 has \[12\] counts"):
    distribution_panels({"bn0": {"noise": COUNTS[:12]}}, EDGES, path)
  with pytest.raises(KwjaxError, match="no curves"):
    depth_curves({"KL": {}}, path)
  with pytest.raises(KwjaxError, match="no panels"):
    region_panels([None], path, half_side=1, columns=1)
  with pytest.raises(KwjaxError, match=r"classes of a square, found \[2, 3\]"):
    region_panels([RegionPanel("a", np.zeros((2, 3), int), np.zeros((0, 2)))], path, half_side=1, columns=1)


def test_regions_and_points_lie_where_they_belong(tmp_path: pathlib.Path) -> None:
  # Class 1 in the upper right quarter alone; a cloud of points in the lower left one.
  classes = np.zeros((8, 8), int)
  classes[4:, 4:] = 1
  cloud = np.random.default_rng(0).uniform(-0.8, -0.2, (3000, 2))
  path = region_panels([RegionPanel("", classes, cloud), None], tmp_path / "a.png", half_side=1, columns=2)
  with PIL.Image.open(path) as image:
    pixels = np.asarray(image.convert("RGB"), float)
  coloured = np.abs(pixels - 255).sum(2) > 60
  rows, columns = np.flatnonzero(coloured.sum(1) > 50), np.flatnonzero(coloured.sum(0) > 50)
  top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
  assert right < pixels.shape[1] / 2  # the second place is empty
  height, width = bottom - top, right - left

  def colour(down: float, across: float) -> np.ndarray:
    return pixels[int(top + down * height), int(left + across * width)]

  blue, orange = colour(0.25, 0.25), colour(0.25, 0.75)
  assert blue[2] > blue[0] + 30
  assert orange[0] > orange[2] + 30
  np.testing.assert_array_equal(colour(0.75, 0.75), blue)
  assert colour(0.75, 0.25).max() < 120  # of the points, darker than any class
