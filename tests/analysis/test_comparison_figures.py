"""Figures that compare: ROC curves against the area by counting, pixels of panels, what is refused."""

from __future__ import annotations

import pathlib

import numpy as np
import PIL.Image
import pytest

from kwjax.analysis import drawing
from kwjax.analysis.comparison_figures import heat_map, roc_curve, roc_panels
from kwjax.analysis.panel_figures import Panel, class_mass_curves, image_panels, share_curves
from kwjax.analysis.roc import auroc
from kwjax.errors import KwjaxError


def pixels_of(path: pathlib.Path) -> np.ndarray:
  with PIL.Image.open(path) as image:
    return np.asarray(image.convert("RGB")).astype(int)


def test_the_area_below_a_curve_is_the_auroc_ties_included() -> None:
  rng = np.random.default_rng(0)
  inside, outside = rng.integers(0, 6, 50), rng.integers(2, 9, 30)
  alarms, hits = roc_curve(inside, outside)
  assert (alarms[0], hits[0], alarms[-1], hits[-1]) == (0, 0, 1, 1)
  assert np.trapezoid(hits, alarms) == pytest.approx(auroc(inside, outside), abs=1e-12)
  alarms, hits = roc_curve([1, 2], [3, 4])
  np.testing.assert_array_equal([alarms, hits], [[0, 0, 0, 0.5, 1], [0, 0.5, 1, 1, 1]])


def test_panels_show_each_pixel_as_a_sharp_square(tmp_path: pathlib.Path) -> None:
  red, blue = np.zeros((2, 3, 4, 4, 3), np.float32)
  red[..., 0], blue[..., 2] = 1.0, 7.0  # what lies above 1 is clipped
  blue[0, 0, 0] = (0, 1, 0)
  panels = [Panel("first", red, "below"), Panel("second", blue, names=["a", "b", "c"])]
  pixels = pixels_of(image_panels(panels, tmp_path / "p.png", images_a_row=2, tile=32))
  square = 32 * 32
  assert (pixels == (255, 0, 0)).all(axis=2).sum() == 3 * square
  assert (pixels == (0, 0, 255)).all(axis=2).sum() == 3 * square - 64
  green = np.argwhere((pixels == (0, 255, 0)).all(axis=2))
  assert (green.max(axis=0) - green.min(axis=0) == 7).all()
  # The second panel is to the right of the first.
  assert np.argwhere((pixels == (255, 0, 0)).all(axis=2))[:, 1].max() < green[:, 1].min()


def test_every_figure_is_written(tmp_path: pathlib.Path) -> None:
  heat_map([[0.04, None], [0.5, 1e-3]], ["a", "b"], ["x", "y$"], tmp_path / "heat.png", label="nats")
  roc_panels({"foreign": {"score": ([1, 2], [2, 3])}}, tmp_path / "roc.png")
  class_mass_curves({"soft": {"few": [0.5, 0.5, 0]}, "hard": {"many": np.full(40, 1 / 40)}}, tmp_path / "mass.png")
  share_curves({"tail": {"bns": [(48, 0.5), (96, 0.75)]}}, tmp_path / "shares.png", xlabel="images")
  for name in ("roc", "mass", "shares"):
    rgb = [int(drawing.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(pixels_of(tmp_path / f"{name}.png") - rgb).sum(axis=2) < 30).sum() > 50, name
  assert (pixels_of(tmp_path / "heat.png") == (238, 238, 238)).all(axis=2).sum() > 500  # the field that is missing


def test_what_cannot_be_drawn_is_refused(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "x.png"
  image = np.zeros((1, 4, 4, 3))
  for draw in (
    lambda: heat_map([[0.0]], ["a"], ["b"], path),
    lambda: heat_map([[1.0]], ["a", "b"], ["c"], path),
    lambda: roc_panels({"a": {}}, path),
    lambda: image_panels([], path, images_a_row=2),
    lambda: image_panels([Panel("a", image), Panel("b", image[:, :2])], path, images_a_row=2),
    lambda: image_panels([Panel("a", image[:0])], path, images_a_row=2),
    lambda: class_mass_curves({}, path),
    lambda: share_curves({"a": {}}, path, xlabel="x"),
  ):
    with pytest.raises(KwjaxError):
      draw()
  assert not path.exists()
