"""Curves that belong together in one PNG: panels side by side, each with axes of its own."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kwjax.analysis.drawing import (
  DPI,
  GREY,
  Axes,
  Figure,
  FuncFormatter,
  LogLocator,
  NullFormatter,
  colour_of,
  plain_axes,
  plain_text,
  save_figure,
)
from kwjax.errors import KwjaxError
from kwjax.runtime.files import PathLike


class CurvePanel(NamedTuple):
  """One set of axes of `curve_panels`.

  Attributes:
    xlabel: name and unit of x.
    ylabel: name and unit of y.
    curves: name -> (x [t], y [t]); "" leaves the name out. What is not finite is left out.
    log: which axes are logarithmic, of "x" and "y"; values that are not positive are left out there.
    marks: text -> x of a dashed vertical line.
    points: curve -> a text beside each of its points, which are then drawn.
    spread: curve -> half the length of the error bar of each y.
  """

  xlabel: str
  ylabel: str
  curves: Mapping[str, tuple[Any, Any]]
  log: str = ""
  marks: Mapping[str, float] = {}
  points: Mapping[str, Sequence[str]] = {}
  spread: Mapping[str, Any] = {}


def curve_panels(panels: Sequence[CurvePanel], path: PathLike) -> pathlib.Path:
  """Curves that belong together, side by side, each panel with axes of its own.

  Args:
    panels: from left to right.
    path: of the PNG file.

  Returns:
    `path`.

  Raises:
    KwjaxError: there is no panel, a panel has nothing to draw, or the lengths of a curve differ.
  """
  if not panels:
    raise KwjaxError("curve_panels: no panels")
  figure = Figure(figsize=(5.4 * len(panels), 4), dpi=DPI, layout="constrained")
  for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
    _draw(plain_axes(axes), panel)
  return save_figure(figure, path)


def _draw(axes: Axes, panel: CurvePanel) -> None:
  drawn = 0
  for i, (name, (xs, ys)) in enumerate(panel.curves.items()):
    x, y = np.asarray(xs, float).reshape(-1), np.asarray(ys, float).reshape(-1)
    if x.shape != y.shape:
      raise KwjaxError(f"curve_panels: curve {name!r} of {panel.ylabel} has {len(x)} x and {len(y)} y")
    good = np.isfinite(x) & np.isfinite(y) & (("x" not in panel.log) | (x > 0)) & (("y" not in panel.log) | (y > 0))
    drawn += int(good.sum())
    texts, spread = panel.points.get(name, ()), panel.spread.get(name)
    errors = None if spread is None else np.asarray(spread, float).reshape(-1)[good]
    axes.errorbar(
      x[good],
      y[good],
      yerr=errors,
      color=colour_of(i),
      label=plain_text(name) if name else None,
      marker="o" if texts or good.sum() < 3 else None,
      capsize=2,
      linewidth=1.6,
    )
    for a, b, text in zip(x[good], y[good], np.asarray(texts)[good] if texts else ()):
      axes.annotate(plain_text(str(text)), (a, b), (4, 4), textcoords="offset points", fontsize=8)
  if not drawn:
    raise KwjaxError(f"curve_panels: nothing to draw of {panel.ylabel}")
  for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
    if name in panel.log:
      axes.set(**{f"{name}scale": "log"})
      low, high = axis.get_view_interval()
      # Within a decade matplotlib would label the minor ticks, one over the other.
      axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
      axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
      axis.set_minor_formatter(NullFormatter())
  for text, place in panel.marks.items():
    axes.axvline(place, color=GREY, linestyle="--", linewidth=1)
    # Height in the frame of the axes, so that no scale moves it.
    axes.text(place, 0.98, f" {plain_text(text)}", transform=axes.get_xaxis_transform(), fontsize=8, va="top")
  axes.set_xlabel(plain_text(panel.xlabel))
  axes.set_ylabel(plain_text(panel.ylabel))
  axes.margins(x=0.07)
  if any(panel.curves):
    axes.legend(frameon=False, fontsize=9)
