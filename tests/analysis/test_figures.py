"""Figures: exact pixels where they must be exact, readable sizes, refused input, no pyplot."""

from __future__ import annotations

import math
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest

from kwjax.analysis import drawing, figures
from kwjax.errors import KwjaxError


def _pixels(path: pathlib.Path) -> np.ndarray:
  with PIL.Image.open(path) as image:
    return np.asarray(image.convert("RGB"))


def test_the_grid_shows_each_pixel_as_a_sharp_square(tmp_path: pathlib.Path) -> None:
  images = np.random.default_rng(0).random((5, 32, 32, 3), dtype=np.float32)
  found = _pixels(figures.image_grid(images, tmp_path / "new" / "grid.png", columns=3, tile=96, gap=4))
  assert found.shape == (2 * 100 + 4, 3 * 100 + 4, 3)
  expected = np.round(images * 255).astype(np.uint8)
  for i in range(5):
    top, left = 4 + i // 3 * 100, 4 + i % 3 * 100
    np.testing.assert_array_equal(found[top : top + 96, left : left + 96], expected[i].repeat(3, 0).repeat(3, 1))
  assert (found[104:200, 204:300] == 255).all()
  assert (found[:4] == 255).all()


def test_the_grid_keeps_large_images_and_writes_titles_above_them(tmp_path: pathlib.Path) -> None:
  images = np.zeros((2, 224, 200, 1), np.uint8)
  found = _pixels(
    figures.image_grid(images, tmp_path / "a.png", titles=["a $x", "a much longer title than fits"], gap=2)
  )
  assert found.shape == (224 + 22 + 4, 2 * 202 + 2, 3)
  for left in (2, 204):
    assert (found[24:248, left : left + 200] == 0).all()
    title = found[2:24, left : left + 200]
    assert (title < 128).any()
    assert (title[:, :3] == 255).all()


def test_pixels_outside_the_range_are_clipped(tmp_path: pathlib.Path) -> None:
  images = np.stack([np.full((8, 8, 3), v, np.float32) for v in (-2, 3, np.nan)])
  found = _pixels(figures.image_grid(images, tmp_path / "a.png", columns=3, tile=8, gap=0))
  assert [found[4, 8 * i + 4, 0] for i in range(3)] == [0, 255, 0]


LAYERS = {f"block_{i}/BatchNorm_0": 10.0 ** (i % 4 - 4) for i in range(52)}
BARS = {"8w8a": {"bns": (0.9, 0.88, 0.92), "g": None}, "4w4a": {"g": (0.01, 0.0, 0.02)}}
CURVES = {"bns": (np.arange(5), 0.5 ** np.arange(5)), "g": ([0], [0.4])}


@pytest.mark.parametrize(
  "make",
  [
    lambda path: figures.image_grid(np.zeros((2, 4, 4, 3)), path, titles=["a", "b"]),
    lambda path: figures.jkl_curve(CURVES, path, references={"real": 0.04}),
    lambda path: figures.layer_bars({"bns": LAYERS, "gaussian": LAYERS}, path),
    lambda path: figures.layer_bars({"bns": {f"layer_{i}": float(i) for i in range(20)}}, path),
    lambda path: figures.accuracy_bars(BARS, path, reference=0.93),
  ],
  ids=["grid", "curve", "many_layers", "few_layers", "accuracy"],
)
def test_a_figure_is_the_same_file_when_made_again(
  tmp_path: pathlib.Path, make: Callable[[pathlib.Path], pathlib.Path]
) -> None:
  first, second = make(tmp_path / "a.png"), make(tmp_path / "b.png")
  assert first.read_bytes() == second.read_bytes()
  pixels = _pixels(first)
  assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1
  assert max(pixels.shape) < 2400


def test_bars_are_as_high_as_their_values(tmp_path: pathlib.Path) -> None:
  path = figures.accuracy_bars({"8w8a": {"a": (0.8, 0.8, 0.8), "b": (0.4, 0.4, 0.4)}}, tmp_path / "bars.png")
  pixels = _pixels(path).astype(int)
  heights = []
  for colour in drawing.COLOURS[:2]:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    heights.append((np.abs(pixels - rgb).sum(axis=2) < 30).sum(axis=0).max())
  assert heights[0] / heights[1] == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize(
  ("value", "text"), [(67964.0, "68000"), (1002.4, "1000"), (4.061, "4.06"), (0.0123, "0.0123"), (float("nan"), "nan")]
)
def test_numbers_in_figures_have_no_exponent(value: float, text: str) -> None:
  assert figures._number(value) == text


def test_what_cannot_be_drawn_is_refused(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "x.png"
  with pytest.raises(KwjaxError, match=r"found \[2, 4, 4\]"):
    figures.image_grid(np.zeros((2, 4, 4)), path)
  with pytest.raises(KwjaxError, match="expected 2 titles, found 1"):
    figures.image_grid(np.zeros((2, 4, 4, 3)), path, titles=["a"])
  with pytest.raises(KwjaxError, match="no positive, finite value in"):
    figures.jkl_curve({"a": ([0, 1], [math.nan, 0])}, path)
  with pytest.raises(KwjaxError, match="curve a has 2 steps and 1 values"):
    figures.jkl_curve({"a": ([0, 1], [1])}, path)
  with pytest.raises(KwjaxError, match=r"b and a differ in \['y'\]"):
    figures.layer_bars({"a": {"x": 1.0}, "b": {"x": 1.0, "y": 1.0}}, path)
  with pytest.raises(KwjaxError, match="no layers"):
    figures.layer_bars({}, path)
  with pytest.raises(KwjaxError, match="nothing was measured"):
    figures.accuracy_bars({"8w8a": {"a": None}}, path)
  with pytest.raises(KwjaxError, match=r"8w8a, a: expected 0 <= low <= value <= high <= 1, found \(93, 90, 95\)"):
    figures.accuracy_bars({"8w8a": {"a": (93, 90, 95)}}, path)
  assert not path.exists()
  (tmp_path / "file").write_text("")
  with pytest.raises(KwjaxError, match="cannot write the figure"):
    figures.image_grid(np.zeros((1, 4, 4, 3)), tmp_path / "file" / "x.png")


def test_no_global_plotting_state_is_loaded() -> None:
  code = "import sys, kwjax.analysis.figures; print('matplotlib.pyplot' in sys.modules)"
  found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert found.stdout.strip() == "False"
