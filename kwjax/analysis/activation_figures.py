"""Figures of activations by layer: distributions in panels, and values over the depth."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kwjax.analysis.drawing import DPI, Figure, LogLocator, MaxNLocator, colour_of, plain_axes, plain_text, save_figure
from kwjax.errors import KwjaxError
from kwjax.runtime.files import PathLike

_COLUMNS = 4
_FILLED = "#d0d0d0"


def some_layers(layers: Sequence[str], most: int = 12) -> list[str]:
  """At most this many layers, spread evenly from the first to the last."""
  chosen = np.unique(np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int))
  return [layers[index] for index in chosen]


def distribution_panels(
  panels: Mapping[str, Mapping[str, Any]],
  edges: Any,
  path: PathLike,
  *,
  filled: str | None = None,
  xlabel: str = "",
  title: str = "",
) -> pathlib.Path:
  """One panel for each layer, with the histograms of several data sets as densities.

  Args:
    panels: layer -> {name: counts [n + 2]}: below the bins, in each bin, above the bins. A name has the same colour in every
      panel.
    edges: f[n + 1], of the bins.
    path: of the PNG file.
    filled: name of the reference data set, drawn as a grey area; or None.
    xlabel: the quantity and its unit.
    title: above all panels.

  Returns:
    `path`.

  Raises:
    KwjaxError: there are no panels, a panel has no counts, or their number does not fit the bins.
  """
  names = list(dict.fromkeys(name for counts in panels.values() for name in counts))
  if not names:
    raise KwjaxError("distribution_panels: no distributions")
  bins = np.asarray(edges, float)
  lines = [name for name in names if name != filled]
  columns = min(_COLUMNS, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure = Figure(figsize=(max(4.0, 2.5 * columns), 1.7 * rows + 0.9), dpi=DPI, layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False, sharex=True).reshape(-1)
  for axes in grid[len(panels) :]:
    axes.set_visible(False)
  for axes, (layer, counts) in zip(grid, panels.items()):
    plain_axes(axes)
    for name, found in counts.items():
      heights = _density(found, bins, f"{name}, {layer}")
      if name == filled:
        axes.stairs(heights, bins, fill=True, color=_FILLED, label=plain_text(name))
      else:
        axes.stairs(heights, bins, color=colour_of(lines.index(name)), linewidth=1.3, label=plain_text(name))
    axes.set_title(plain_text(layer), fontsize=8)
    axes.set_xlim(bins[0], bins[-1])
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="y", labelleft=False, length=0)
  for axes in grid[max(0, len(panels) - columns) : len(panels)]:
    axes.tick_params(labelbottom=True)
  figure.supxlabel(plain_text(xlabel), fontsize=9)
  figure.suptitle(plain_text(title), fontsize=10)
  handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels())}
  figure.legend(
    list(handles.values()), list(handles), loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9
  )
  return save_figure(figure, path)


class DepthCurve(NamedTuple):
  """One value for every layer.

  Attributes:
    values: [layers], in execution order; a value that is not positive leaves a gap.
    colour: small whole number, shared by curves that belong together.
    dashed: distinguishes two curves of one colour.
  """

  values: Any
  colour: int
  dashed: bool = False


def depth_curves(panels: Mapping[str, Mapping[str, DepthCurve]], path: PathLike) -> pathlib.Path:
  """Values of every layer over the depth of a network, on logarithmic axes side by side.

  Args:
    panels: name and unit of a quantity -> {name: curve}.
    path: of the PNG file.

  Returns:
    `path`.

  Raises:
    KwjaxError: there are no curves.
  """
  if not any(panels.values()):
    raise KwjaxError("depth_curves: no curves")
  figure = Figure(figsize=(max(4.6, 4.6 * len(panels)), 4.2), dpi=DPI, layout="constrained")
  grid = figure.subplots(1, len(panels), squeeze=False)[0]
  for axes, (ylabel, curves) in zip(grid, panels.items()):
    plain_axes(axes)
    for name, curve in curves.items():
      y = np.asarray(curve.values, float)
      axes.plot(
        np.arange(1, len(y) + 1),
        np.where(y > 0, y, np.nan),
        color=colour_of(curve.colour),
        linestyle="--" if curve.dashed else "-",
        linewidth=1.4,
        marker="o" if len(y) < 3 else None,
        label=plain_text(name),
      )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    if axes.get_ylim()[1] < 20 * axes.get_ylim()[0]:
      # Over about one decade, ticks at powers of ten would be one number.
      axes.yaxis.set_minor_locator(LogLocator(subs=(1.2, 1.5, 2, 3, 4, 5, 6, 7, 8)))
      axes.yaxis.set_minor_formatter("{x:g}")
      axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("BatchNorm layer, in execution order")
    axes.set_ylabel(plain_text(ylabel))
  handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels())}
  figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
  return save_figure(figure, path)


def _density(counts: Any, edges: np.ndarray, where: str) -> np.ndarray:
  found = np.asarray(counts, float)
  if found.shape != (len(edges) + 1,) or not found.sum() > 0:
    raise KwjaxError(
      f"distribution_panels: {where} has {list(found.shape)} counts, {int(found.sum())} in all, for {len(edges) - 1} bins"
    )
  return found[1:-1] / (found.sum() * np.diff(edges))
