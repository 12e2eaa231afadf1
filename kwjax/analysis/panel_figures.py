"""Figures that compare schemes: panels of images, class mass, shares against a number."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kwjax.analysis.drawing import DPI, GREY, Figure, colour_of, plain_axes, plain_text, save_figure
from kwjax.errors import KwjaxError
from kwjax.runtime.files import PathLike


class Panel(NamedTuple):
  """Images with a title and a caption.

  Attributes:
    title: above.
    images: [n,h,w,c], c 1 or 3; floats, shown clipped to [0, 1].
    caption: below.
    names: above each column of images; empty for none.
  """

  title: str
  images: np.ndarray
  caption: str = ""
  names: Sequence[str] = ()


def image_panels(
  panels: Sequence[Panel], path: PathLike, *, images_a_row: int, panels_a_row: int = 2, tile: int = 64
) -> pathlib.Path:
  """Grids of images side by side, each with its title and caption. Pixels are sharp squares.

  Args:
    panels: all with images of one shape.
    path: of the PNG file.
    images_a_row: images in a row of a panel.
    panels_a_row: panels in a row of the figure.
    tile: enlarge, by a whole factor, until an image is about this many pixels high; larger ones keep their size.

  Returns:
    `path`.

  Raises:
    KwjaxError: there are no panels, one has no images, or their shapes differ.
  """
  shapes = {np.shape(panel.images)[1:] for panel in panels}
  if len(shapes) != 1 or any(not len(panel.images) for panel in panels):
    raise KwjaxError(f"image_panels: expected panels with images of one shape, found {sorted(shapes)}")
  (height, width, _), gap, dpi = shapes.pop(), 3, 100
  factor = max(1, round(tile / height))
  grids = [_mosaic(panel.images, images_a_row, factor, gap) for panel in panels]
  high, wide = max(g.shape[0] for g in grids), max(g.shape[1] for g in grids)
  head, foot, margin = 44 if any(panel.names for panel in panels) else 28, 26, 14
  panels_a_row = min(panels_a_row, len(panels))
  total = math.ceil(len(panels) / panels_a_row) * (high + head + foot + margin), panels_a_row * (wide + margin) + margin
  canvas = np.ones((*total, 3), np.float32)
  figure = Figure(figsize=(total[1] / dpi, total[0] / dpi), dpi=dpi)
  for number, (panel, grid) in enumerate(zip(panels, grids, strict=True)):
    row, column = divmod(number, panels_a_row)
    top, left = row * (high + head + foot + margin) + head, column * (wide + margin) + margin
    canvas[top : top + grid.shape[0], left : left + grid.shape[1]] = grid

    def write(text: str, x: float, y: float, **how: Any) -> None:
      figure.text(x / total[1], 1 - y / total[0], plain_text(text), **how)

    write(panel.title, left, top - head + 18, fontsize=11, fontweight="bold", va="baseline")
    write(panel.caption, left, top + grid.shape[0] + 16, fontsize=9, va="baseline")
    for place, name in enumerate(panel.names[:images_a_row]):
      middle = left + place * (factor * width + gap) + factor * width / 2
      write(name, middle, top - 5, fontsize=8, ha="center", va="baseline", color=GREY)
  # The figure has exactly the canvas's pixels, and figimage copies without resampling.
  figure.figimage(np.round(255 * canvas).astype(np.uint8), origin="upper")
  return save_figure(figure, path, dpi=dpi)


def _mosaic(images: np.ndarray, columns: int, factor: int, gap: int) -> np.ndarray:
  """f32[h,w,3] in [0, 1]: the images row by row on white, enlarged by a whole factor."""
  pixels = np.clip(np.nan_to_num(np.asarray(images, np.float32)), 0, 1)
  pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3)).repeat(factor, axis=1).repeat(factor, axis=2)
  count, height, width, _ = pixels.shape
  columns = min(columns, count)
  rows = math.ceil(count / columns)
  canvas = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), np.float32)
  for i in range(count):
    top, left = i // columns * (height + gap), i % columns * (width + gap)
    canvas[top : top + height, left : left + width] = pixels[i]
  return canvas


def class_mass_curves(panels: Mapping[str, Mapping[str, Any]], path: PathLike) -> pathlib.Path:
  """Mass of every class, from the most to the least predicted: flat for balanced predictions.

  Args:
    panels: title -> {name: f[k], shares that sum to 1}. With more than 30 classes the axis is logarithmic, and the curve
      ends where the mass is zero.
    path: of the PNG file.

  Returns:
    `path`.

  Raises:
    KwjaxError: there are no curves.
  """
  names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
  if not names:
    raise KwjaxError("class_mass_curves: no curves")
  figure = Figure(figsize=(max(5.0, 4.6 * len(panels)), 3.6), dpi=DPI, layout="constrained")
  grid = figure.subplots(1, len(panels), squeeze=False)[0]
  for axes, (title, curves) in zip(grid, panels.items()):
    plain_axes(axes)
    is_few = all(len(masses) <= 30 for masses in curves.values())
    for name, masses in curves.items():
      sorted_masses, place = np.sort(np.asarray(masses, float))[::-1], names.index(name)
      size, present = len(sorted_masses), int((sorted_masses > 0).sum())
      axes.plot(
        np.arange(1, size + 1),
        sorted_masses if is_few else np.where(sorted_masses > 0, sorted_masses, np.nan),
        color=colour_of(place),
        label=plain_text(name),
        linewidth=_width(place),
        marker="o" if is_few or present < 3 else None,
        markersize=_width(place) + 2,
      )
      axes.axhline(1 / size, color=GREY, linestyle="--", linewidth=0.8)
      axes.set_xlim(1 - 0.03 * size, 1.03 * size)
    axes.set_yscale("linear" if is_few else "log")
    if is_few:
      axes.set_ylim(bottom=0)
    axes.set_title(plain_text(title), fontsize=10)
    axes.set_xlabel("classes, most predicted first")
  grid[0].set_ylabel("share of the predictions")
  _legend_above(figure, grid)
  return save_figure(figure, path)


def share_curves(
  panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: PathLike, *, xlabel: str
) -> pathlib.Path:
  """Shares in per cent against a number on a logarithmic axis; one panel for each measure.

  Args:
    panels: title -> {name: [(number > 0, share in [0, 1])]}.
    path: of the PNG file.
    xlabel: name of the number.

  Returns:
    `path`.

  Raises:
    KwjaxError: there are no curves.
  """
  names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
  if not names:
    raise KwjaxError("share_curves: no curves")
  columns = min(2, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure = Figure(figsize=(max(5.0, 4.2 * columns), 2.6 * rows + 0.6), dpi=DPI, layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False, sharey=True).reshape(-1)
  for axes in grid[len(panels) :]:
    axes.set_visible(False)
  for axes, (title, curves) in zip(grid, panels.items()):
    plain_axes(axes)
    for name, points in curves.items():
      (x, y), place = np.asarray(sorted(points), float).T, names.index(name)
      axes.plot(
        x,
        100 * y,
        color=colour_of(place),
        label=plain_text(name),
        linewidth=_width(place),
        marker="o",
        markersize=_width(place) + 2,
      )
    ticks = sorted({x for points in curves.values() for x, _ in points})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 103)
    axes.set_title(plain_text(title), fontsize=10)
    axes.set_xlabel(xlabel)
  for axes in grid[: len(panels) : columns]:
    axes.set_ylabel("%")
  _legend_above(figure, grid)
  return save_figure(figure, path)


def _width(place: int) -> float:
  """Line width of a curve by its index; curves that coincide stay visible below the next one."""
  return max(1.0, 3.0 - 0.5 * place)


def _legend_above(figure: Figure, grid: Any) -> None:
  """One legend for all panels, each name once."""
  handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels())}
  figure.legend(
    list(handles.values()),
    list(handles),
    loc="outside upper center",
    ncols=min(len(handles), 6),
    frameon=False,
    fontsize=9,
  )
