"""Figures of bits by layer: loss or accuracy by size, and the bits of each layer."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence

from kwjax.analysis.drawing import colour_of, new_axes, plain_text, save_figure
from kwjax.errors import KwjaxError
from kwjax.runtime.files import PathLike


def size_curves(
  curves: Mapping[str, Sequence[tuple[float, float | None]]],
  path: PathLike,
  *,
  label: str,
  size_label: str = "weights (kB)",
  logarithmic: bool = False,
) -> pathlib.Path:
  """Loss or accuracy of a network by its size, one curve for each allocation method.

  Args:
    curves: `{name: [(size, value), ...]}`, any order; a value of None or NaN is left out.
    path: of the PNG file.
    label: name and unit of the values.
    size_label: name and unit of the sizes.
    logarithmic: whether the scale of the values is logarithmic; values that are not positive are then left out.

  Returns:
    `path`.

  Raises:
    KwjaxError: there is nothing to draw, or the file cannot be written.
  """
  figure, axes = new_axes(5.6, 3.6)
  drawn = 0
  for index, (name, points) in enumerate(curves.items()):
    shown = [(size, value) for size, value in sorted(points, key=lambda point: point[0]) if _usable(value, logarithmic)]
    if shown:
      axes.plot(*zip(*shown), color=colour_of(index), marker="o", markersize=3.5, linewidth=1.4, label=plain_text(name))
      drawn += 1
  if not drawn:
    raise KwjaxError("size_curves: no value to draw")
  if logarithmic:
    axes.set_yscale("log")
  axes.set_xlabel(plain_text(size_label), fontsize=9)
  axes.set_ylabel(plain_text(label), fontsize=9)
  axes.legend(frameon=False, fontsize=9)
  return save_figure(figure, path)


def bits_by_layer(bits: Mapping[str, tuple[int | None, int | None]], path: PathLike) -> pathlib.Path:
  """Bits of weights and of inputs of every layer, in execution order.

  Args:
    bits: `{layer: (weights, activations)}`; None means float and is left out.
    path: of the PNG file.

  Returns:
    `path`.

  Raises:
    KwjaxError: there are no layers, or the file cannot be written.
  """
  if not bits:
    raise KwjaxError("bits_by_layer: no layers")
  figure, axes = new_axes(max(4.0, 1.6 + 0.17 * len(bits)), 3.4)
  for index, name in enumerate(("weights", "inputs")):
    heights = [math.nan if ends[index] is None else float(ends[index] or 0) for ends in bits.values()]
    places = [place + 0.38 * (index - 0.5) for place in range(len(bits))]
    axes.bar(places, heights, 0.36, color=colour_of(index), label=name)
  axes.set_xticks(range(len(bits)), [plain_text(name) for name in bits], rotation=90, fontsize=6)
  axes.set_ylabel("bits", fontsize=9)
  axes.legend(frameon=False, fontsize=9, ncols=2)
  return save_figure(figure, path)


def _usable(value: float | None, logarithmic: bool) -> bool:
  return value is not None and math.isfinite(value) and (value > 0 or not logarithmic)
