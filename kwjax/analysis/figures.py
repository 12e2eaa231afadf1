"""Figures of a run: image grids, J_KL curves, divergence by layer, accuracy. Each writes one PNG."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kwjax.analysis.drawing import GREY, Figure, colour_of, new_axes, plain_text, save_figure
from kwjax.errors import KwjaxError
from kwjax.runtime.files import PathLike


def image_grid(
  images: np.ndarray,
  path: PathLike,
  *,
  titles: Sequence[str] | None = None,
  columns: int | None = None,
  tile: int = 96,
  gap: int = 4,
) -> pathlib.Path:
  """A grid of images. Small images are enlarged by a whole factor, so that each pixel stays a sharp square.

  Args:
    images: [n,h,w,c], c 1 or 3; floats in [0, 1] (others are clipped) or uint8.
    path: of the PNG file.
    titles: a short text above each image; length n.
    columns: images in a row; default: as square as possible.
    tile: enlarge until an image is about this many pixels high; larger images keep their size.
    gap: pixels between images.

  Returns:
    `path`.

  Raises:
    KwjaxError: the arrays have another form.
  """
  pixels = np.asarray(images)
  if pixels.ndim != 4 or not len(pixels) or pixels.shape[3] not in (1, 3):
    raise KwjaxError(f"image_grid: expected images [n,h,w,1 or 3], n >= 1, found {list(pixels.shape)}")
  if titles is not None and len(titles) != len(pixels):
    raise KwjaxError(f"image_grid: expected {len(pixels)} titles, found {len(titles)}")
  if pixels.dtype != np.uint8:
    pixels = np.round(np.clip(np.nan_to_num(pixels.astype(np.float32)), 0, 1) * 255).astype(np.uint8)
  count, height, width, channels = pixels.shape
  factor = max(1, round(tile / height))
  pixels = np.repeat(np.repeat(pixels, factor, axis=1), factor, axis=2)
  if channels == 1:
    pixels = np.repeat(pixels, 3, axis=3)
  height, width = height * factor, width * factor
  columns = min(count, columns or math.ceil(math.sqrt(count)))
  rows = math.ceil(count / columns)
  head = 22 if titles is not None else 0
  canvas = np.full((rows * (height + head + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
  corners = []
  for i in range(count):
    top, left = gap + i // columns * (height + head + gap) + head, gap + i % columns * (width + gap)
    canvas[top : top + height, left : left + width] = pixels[i]
    corners.append((left, top))
  # The figure has exactly the canvas's pixels, and figimage copies without resampling.
  # A thousandth of a pixel more: older releases of matplotlib cut 405.99999 pixels off to 405.
  figure = Figure(figsize=((canvas.shape[1] + 1e-3) / 100, (canvas.shape[0] + 1e-3) / 100), dpi=100)
  figure.figimage(canvas, origin="upper")
  for text, (left, top) in zip(titles or (), corners):
    size = min(10.0, 72 / 100 * 1.7 * width / max(len(text), 1))
    where = ((left + width / 2) / canvas.shape[1], 1 - (top - 5) / canvas.shape[0])
    figure.text(*where, plain_text(text), ha="center", va="bottom", fontsize=size)
  return save_figure(figure, path, dpi=100)


def jkl_curve(
  curves: Mapping[str, tuple[Any, Any]], path: PathLike, *, references: Mapping[str, float] | None = None
) -> pathlib.Path:
  """J_KL over the optimization steps, on a logarithmic axis.

  Args:
    curves: name -> (steps [t], J_KL [t] in nats); values that are not positive and finite leave a gap.
    path: of the PNG file.
    references: name -> J_KL of other data (real images, noise), drawn as dashed lines.

  Returns:
    `path`.

  Raises:
    KwjaxError: no curve holds a positive number, or the lengths of a curve differ.
  """
  figure, axes = new_axes(7, 4)
  drawn = 0
  for i, (name, (steps, values)) in enumerate(curves.items()):
    x, y = np.asarray(steps, float).reshape(-1), np.asarray(values, float).reshape(-1)
    if x.shape != y.shape:
      raise KwjaxError(f"jkl_curve: curve {name} has {len(x)} steps and {len(y)} values")
    good = np.isfinite(y) & (y > 0)
    drawn += int(good.sum())
    marker = "o" if len(x) < 3 else None
    axes.plot(x, np.where(good, y, np.nan), color=colour_of(i), label=plain_text(name), marker=marker, linewidth=1.6)
    if good.any():
      last = np.flatnonzero(good)[-1]
      # On white: a reference line at the same height would cross the number.
      white = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
      axes.annotate(
        f"{y[last]:.3g}",
        (x[last], y[last]),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        bbox=white,
      )
  if not drawn:
    raise KwjaxError(f"jkl_curve: no positive, finite value in {sorted(curves)}")
  for name, value in (references or {}).items():
    axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
    # Text in a blended frame: left edge of the axes, height of the line.
    axes.text(
      0.01, value, plain_text(f"{name} {_number(value)}"), transform=axes.get_yaxis_transform(), fontsize=8, va="bottom"
    )
  axes.set_yscale("log")
  axes.set_xlabel("step")
  axes.set_ylabel("$J_{KL}$ (nats)")
  axes.margins(x=0.07)
  if len(curves) > 1 or "" not in curves:
    axes.legend(frameon=False, fontsize=9)
  return save_figure(figure, path)


def _number(value: float) -> str:
  """Three significant digits and never an exponent: 68000, 1000, 4.06, 0.0123."""
  return np.format_float_positional(value, 3, fractional=False, trim="-")


def layer_bars(divergences: Mapping[str, Mapping[str, float]], path: PathLike, *, worst: int = 5) -> pathlib.Path:
  """Mean divergence of each BatchNorm layer, in execution order, for one or more data sets.

  Args:
    divergences: data set -> {layer: divergence in nats}; all with the same layers, in execution order.
    path: of the PNG file.
    worst: number of the worst layers of the first data set to list by name; up to 24 layers are all named instead.

  Returns:
    `path`.

  Raises:
    KwjaxError: there are no layers, or the data sets have different ones.
  """
  if not divergences or not next(iter(divergences.values())):
    raise KwjaxError("layer_bars: no layers")
  sets = list(divergences)
  layers = list(divergences[sets[0]])
  for name in sets[1:]:
    if set(divergences[name]) != set(layers):
      raise KwjaxError(f"layer_bars: {name} and {sets[0]} differ in {sorted(set(divergences[name]) ^ set(layers))}")
  named = len(layers) <= 24
  figure, axes = new_axes(
    max(7.0, min(13.0, 1.5 + 0.16 * len(layers) * max(1, len(sets) * 0.6))), 4.8 if named else 4.2
  )
  positions, width = np.arange(len(layers)), 0.84 / len(sets)
  positive = [v for name in sets for v in divergences[name].values() if np.isfinite(v) and v > 0]
  for i, name in enumerate(sets):
    values = np.array([divergences[name][layer] for layer in layers], float)
    axes.bar(positions + (i - (len(sets) - 1) / 2) * width, values, width, color=colour_of(i), label=plain_text(name))
  first = np.array([divergences[sets[0]][layer] for layer in layers], float)
  order = np.argsort(-np.nan_to_num(first, nan=np.inf))[: min(worst, len(layers))]
  if positive and max(positive) > 30 * min(positive):
    axes.set_yscale("log")
  axes.set_ylabel("mean divergence (nats)")
  axes.margins(x=0.01)
  if named:
    axes.set_xticks(positions, [plain_text(_short(layer, 24)) for layer in layers], rotation=60, ha="right", fontsize=7)
  else:
    axes.set_xlabel("layer, in execution order")
    listing = "\n".join(f"{positions[i]}  {_short(layers[i])}  {_number(first[i])}" for i in order)
    title = f"worst layers, {sets[0]}:\n" if len(sets) > 1 else "worst layers:\n"
    # Beside the axes, so that it hides no bar.
    axes.text(1.01, 1, plain_text(title + listing), transform=axes.transAxes, va="top", fontsize=8, linespacing=1.5)
  if len(sets) > 1 or not named:
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)
  return save_figure(figure, path)


def accuracy_bars(
  accuracies: Mapping[str, Mapping[str, tuple[float, float, float] | None]],
  path: PathLike,
  *,
  reference: float | None = None,
  ylabel: str = "top-1 (%)",
) -> pathlib.Path:
  """Accuracy for each setting of bits (groups) and source of data (colours), with error bars.

  Args:
    accuracies: bits -> {data source: (value, low, high)}, fractions in [0, 1]; low and high are the ends of the error
      bar. None, or an absent source, is labelled as not measured.
    path: of the PNG file.
    reference: the float network's value, drawn as a dashed line.
    ylabel: name of the axis.

  Returns:
    `path`.

  Raises:
    KwjaxError: nothing was measured, or a value is not within its error bar and [0, 1].
  """
  sources = list(dict.fromkeys(source for row in accuracies.values() for source in row))
  if not any(value is not None for row in accuracies.values() for value in row.values()):
    raise KwjaxError("accuracy_bars: nothing was measured")
  figure, axes = new_axes(max(6.0, 1.6 + 0.55 * len(accuracies) * (len(sources) + 1)), 4)
  width = 0.84 / len(sources)
  for i, source in enumerate(sources):
    for group, (bits, row) in enumerate(accuracies.items()):
      x, found = group + (i - (len(sources) - 1) / 2) * width, row.get(source)
      if found is None:
        axes.text(x, 1, "not measured", rotation=90, ha="center", va="bottom", fontsize=7, color=GREY)
        continue
      value, low, high = found
      if not 0 <= low <= value <= high <= 1:
        raise KwjaxError(f"accuracy_bars: {bits}, {source}: expected 0 <= low <= value <= high <= 1, found {found}")
      errors = [[100 * (value - low)], [100 * (high - value)]]
      axes.bar(x, 100 * value, width * 0.94, color=colour_of(i), yerr=errors, ecolor="#333333", capsize=2)
      # At the foot, clear of the error bar and the reference line.
      inside = value > 0.1
      place, colour = (1.5, "white") if inside else (100 * high + 1, "black")
      axes.text(x, place, f"{100 * value:.1f}", ha="center", va="bottom", fontsize=8, color=colour)
  if reference is not None:
    axes.axhline(100 * reference, color=GREY, linestyle="--", linewidth=1, label=f"float {100 * reference:.1f}")
  for i, source in enumerate(sources):
    axes.bar(0, 0, color=colour_of(i), label=plain_text(source))
  axes.set_xticks(range(len(accuracies)), [plain_text(bits) for bits in accuracies])
  axes.set_ylabel(ylabel)
  axes.set_xlim(-0.6, len(accuracies) - 0.4)
  axes.set_ylim(0, 100)
  axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)
  return save_figure(figure, path)


def _short(layer: str, length: int = 34) -> str:
  """A layer path shortened to its end, which distinguishes it."""
  return layer if len(layer) <= length else "…" + layer[1 - length :]
