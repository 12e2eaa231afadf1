"""Figures that compare data sets: heat maps and ROC curves."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kwjax.analysis.drawing import DPI, GREY, Figure, LogNorm, colour_of, plain_axes, plain_text, save_figure
from kwjax.errors import KwjaxError
from kwjax.runtime.files import PathLike

_DARK = 0.55  # share of the colour scale above which text is white


def heat_map(
  values: Any, rows: Sequence[str], columns: Sequence[str], path: PathLike, *, label: str = ""
) -> pathlib.Path:
  """A heat map of positive numbers on a logarithmic scale, with each number in its field.

  Args:
    values: [r,c]; values that are not positive and finite are shown as not measured.
    rows: r names.
    columns: c names.
    path: of the PNG file.
    label: name and unit of the numbers.

  Returns:
    `path`.

  Raises:
    KwjaxError: no value is positive and finite, or the number of names differs from the values.
  """
  found = np.array([[np.nan if value is None else value for value in row] for row in values], float)
  if found.shape != (len(rows), len(columns)):
    raise KwjaxError(f"heat_map: {len(rows)} x {len(columns)} names, but values {list(found.shape)}")
  good = np.isfinite(found) & (found > 0)
  if not good.any():
    raise KwjaxError("heat_map: no positive, finite value")
  low, high = float(found[good].min()), float(found[good].max())
  norm = LogNorm(low, max(high, 1.01 * low))
  longest = max(map(len, rows))
  figure = Figure(
    figsize=(1.8 + 0.08 * longest + 1.35 * len(columns), 1.3 + 0.42 * len(rows)), dpi=DPI, layout="constrained"
  )
  axes = figure.subplots()
  axes.set_facecolor("#eeeeee")
  image = axes.imshow(np.where(good, found, np.nan), norm=norm, cmap="YlGnBu", aspect="auto")
  for (row, column), value in np.ndenumerate(found):
    is_dark = good[row, column] and float(norm(value)) > _DARK
    text = f"{value:.3g}" if good[row, column] else "not measured"
    size = 9 if good[row, column] else 7
    axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if is_dark else "black")
  axes.set_xticks(range(len(columns)), [plain_text(name) for name in columns], rotation=20, ha="right", fontsize=9)
  axes.set_yticks(range(len(rows)), [plain_text(name) for name in rows], fontsize=9)
  axes.spines[:].set_visible(False)
  axes.tick_params(length=0)
  # Ticks at powers of ten would often be one or none.
  bar = figure.colorbar(image, ax=axes, label=plain_text(label), pad=0.02)
  bar.set_ticks(list(np.geomspace(low, max(high, 1.01 * low), 5)))
  bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
  bar.ax.minorticks_off()
  return save_figure(figure, path)


def roc_curve(scores_in: Any, scores_out: Any) -> tuple[np.ndarray, np.ndarray]:
  """Shares of inside and of outside images at or above each threshold, from (0, 0) to (1, 1); `auroc` is its area.

  Args:
    scores_in: [m] numbers, of images that are like the training data.
    scores_out: [n] numbers, of other images, which should be higher.

  Returns:
    (false alarms, hits), f64[t] each, ascending; trapezoids below them give the exact area, ties included.
  """
  inside, outside = (np.sort(np.ravel(np.asarray(scores, np.float64))) for scores in (scores_in, scores_out))
  thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
  alarms = (inside.size - np.searchsorted(inside, thresholds, "left")) / inside.size
  hits = (outside.size - np.searchsorted(outside, thresholds, "left")) / outside.size
  return np.concatenate([[0.0], alarms]), np.concatenate([[0.0], hits])


def roc_panels(
  panels: Mapping[str, Mapping[str, tuple[Any, Any]]], path: PathLike, *, columns: int = 4
) -> pathlib.Path:
  """ROC curves with their areas: one panel for each outside set and one colour for each score.

  Args:
    panels: outside set -> {score: (scores of inside images [m], scores of outside images [n])}.
    path: of the PNG file.
    columns: panels in a row.

  Returns:
    `path`.

  Raises:
    KwjaxError: there are no curves.
  """
  # The fullest panel first: it has all names in order.
  names = list(dict.fromkeys(name for curves in sorted(panels.values(), key=len, reverse=True) for name in curves))
  if not names:
    raise KwjaxError("roc_panels: no curves")
  columns = min(columns, len(panels))
  rows = math.ceil(len(panels) / columns)
  # Wide enough for a legend below a single panel.
  figure = Figure(figsize=(max(4.0, 2.7 * columns), 2.9 * rows + 0.6), dpi=DPI, layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).reshape(-1)
  drawn: dict[str, Any] = {}
  for axes, (title, curves) in zip(grid, panels.items()):
    plain_axes(axes)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=0.8)
    for place, (name, (scores_in, scores_out)) in enumerate(curves.items()):
      alarms, hits = roc_curve(scores_in, scores_out)
      shade = colour_of(names.index(name))
      (drawn[name],) = axes.plot(alarms, hits, color=shade, linewidth=1.4)
      area = f"{np.trapezoid(hits, alarms):.3f}"
      axes.text(0.97, 0.04 + 0.085 * (len(curves) - 1 - place), area, color=shade, ha="right", fontsize=8)
    axes.set_title(plain_text(title), fontsize=10)
    axes.set_aspect("equal")
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    # A panel above an empty place needs its own labels.
    axes.tick_params(labelbottom=True)
  for axes in grid[len(panels) :]:
    axes.set_visible(False)
  figure.supxlabel("share of own images flagged", fontsize=9)
  figure.supylabel("share of these images flagged", fontsize=9)
  shown = [name for name in names if name in drawn]
  figure.legend(
    [drawn[name] for name in shown],
    [plain_text(name) for name in shown],
    loc="outside upper center",
    ncols=min(len(shown), 2 if columns == 1 else 5),
    frameon=False,
    fontsize=9,
  )
  return save_figure(figure, path)
