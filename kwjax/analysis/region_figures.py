"""Decision regions in the plane."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kwjax.analysis.drawing import COLOURS, Figure, ListedColormap, colour_of, plain_text, save_figure, to_rgb
from kwjax.errors import KwjaxError
from kwjax.runtime.files import PathLike

_POINTS = "#333333"
_DPI = 100


class RegionPanel(NamedTuple):
  """Predictions of one network in a square of the plane.

  Attributes:
    title: above.
    classes: i[g,g] in 0..6, at the centres of g x g cells, from below and from the left.
    points: f[n,2], drawn on top; points outside are left out.
    labels: i[n], classes of the points, or None: one colour for all.
    ylabel: beside the panel.
  """

  title: str
  classes: Any
  points: Any
  labels: Any = None
  ylabel: str = ""


def region_panels(
  panels: Sequence[RegionPanel | None], path: PathLike, *, half_side: float, columns: int
) -> pathlib.Path:
  """Decision regions side by side.

  Args:
    panels: row by row; None leaves a place empty.
    path: of the PNG file.
    half_side: the square is [-half_side, half_side] in both directions.
    columns: panels in a row.

  Returns:
    `path`.

  Raises:
    KwjaxError: there are no panels, or the classes of a panel are not square.
  """
  if not any(panel is not None for panel in panels):
    raise KwjaxError("region_panels: no panels")
  # Lighter than the points of the same class.
  pale = ListedColormap([tuple(1 - 0.35 * (1 - np.asarray(to_rgb(colour)))) for colour in COLOURS])
  rows = math.ceil(len(panels) / columns)
  figure = Figure(figsize=(2.3 * columns + 0.3, 2.55 * rows), dpi=_DPI, layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
  for axes in grid[len(panels) :]:
    axes.set_visible(False)
  for axes, panel in zip(grid, panels):
    if panel is None:
      axes.set_visible(False)
      continue
    classes = np.asarray(panel.classes)
    if classes.ndim != 2 or classes.shape[0] != classes.shape[1]:
      raise KwjaxError(f"region_panels: expected classes of a square, found {list(classes.shape)}")
    extent = (-half_side, half_side, -half_side, half_side)
    axes.imshow(
      classes, origin="lower", extent=extent, cmap=pale, vmin=0, vmax=len(COLOURS) - 1, interpolation="nearest"
    )
    x, y = np.asarray(panel.points, float).reshape(-1, 2).T
    labels = panel.labels
    colours = _POINTS if labels is None else [colour_of(int(label)) for label in np.asarray(labels)]
    axes.scatter(x, y, s=3, c=colours, linewidths=0)
    axes.set_xlim(-half_side, half_side)
    axes.set_ylim(-half_side, half_side)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(plain_text(panel.title), fontsize=8)
    axes.set_ylabel(plain_text(panel.ylabel), fontsize=10)
  # Flat colours stay clear with fewer pixels, and the file with twenty panels stays small.
  return save_figure(figure, path, dpi=_DPI)
