"""Sliding windows over NHWC images as static slices: the shape arithmetic of convolutions and poolings.

XLA's CPU backend turns a sum of static slices into one vectorised loop, where its windowed primitives run scalar code.
A tap (i, j) is one position inside the window; the tap's image holds, for every output position, the input it sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

LAYOUT = ("NHWC", "HWIO", "NHWC")
"""Of images, kernels and results, as `lax.conv_general_dilated` names it."""

Padding = tuple[tuple[int, int], tuple[int, int]]
"""((top, bottom), (left, right)), in pixels."""


@dataclasses.dataclass(frozen=True)
class Window:
  """A window of `size` positions moved by `stride` over images padded by `padding` = ((top, bottom), (left, right))."""

  size: tuple[int, int]
  stride: tuple[int, int]
  padding: Padding

  @property
  def taps(self) -> list[tuple[int, int]]:
    """Positions inside the window in row-major order."""
    return [(i, j) for i in range(self.size[0]) for j in range(self.size[1])]

  def output_size(self, height: int, width: int) -> tuple[int, int]:
    """Number of output rows and columns for an unpadded image of `height` x `width`."""
    rows, columns = (
      (extent + low + high - size) // stride + 1
      for extent, (low, high), size, stride in zip((height, width), self.padding, self.size, self.stride)
    )
    return rows, columns

  @property
  def mirrored(self) -> Window:
    """Geometry of the transpose of a convolution of stride 1, itself a convolution of stride 1, with the kernel mirrored."""
    (top, bottom), (left, right) = self.padding
    rows, columns = self.size[0] - 1, self.size[1] - 1
    return Window(self.size, (1, 1), ((rows - top, rows - bottom), (columns - left, columns - right)))


def pad_images(images: Array, padding: Padding, value: float | Array = 0.0) -> Array:
  """Images f32[b,h,w,c] with rows and columns of `value` added, or cut off where the padding is negative.

  The transpose of a convolution whose padding is larger than its kernel reaches is one with negative padding.

  Returns: f32[b,h+top+bottom,w+left+right,c].
  """
  rows, columns = ((low, high, 0) for low, high in padding)
  return lax.pad(images, jnp.asarray(value, images.dtype), ((0, 0, 0), rows, columns, (0, 0, 0)))


def tap_of_padded(padded: Array, window: Window, tap: tuple[int, int], rows: int, columns: int) -> Array:
  """What `tap` sees, read from images that are padded already: f32[b,h',w',c] -> f32[b,rows,columns,c]."""
  (i, j), (down, right) = tap, window.stride
  batch, _, _, channels = padded.shape
  stop = (batch, i + (rows - 1) * down + 1, j + (columns - 1) * right + 1, channels)
  return lax.slice(padded, (0, i, j, 0), stop, (1, down, right, 1))


def scatter_taps(
  shape: tuple[int, ...],
  window: Window,
  outputs: tuple[Array, ...],
  fill: tuple[float, ...],
  contribution: Callable[[tuple[int, int], tuple[Array, ...]], Array],
) -> Array:
  """Transpose of "slice every tap": gives each input position the sum of what its windows send back to it.

  Input row u sits in the windows o with o * stride + i - top = u, so rows of equal (u + top) mod stride ("phases") see
  the same taps i. Each phase is a sum of unit-stride slices and the phases are interleaved once at the end; padding
  every tap's contribution on its own, as autodiff does, costs up to 20 times more with 5x5 windows at stride 2.

  Args:
    shape: (b, h, w, c) of the unpadded input.
    window: the geometry.
    outputs: arrays [b,oh,ow,c] that `contribution` reads, all at the same output position.
    fill: value of each of them outside the output, where a window does not exist.
    contribution: (tap, outputs at the window that sees an input position through this tap) -> what comes back.

  Returns: f32[b,h,w,c].
  """
  batch, height, width, channels = shape
  reach = [-(-size // stride) - 1 for size, stride in zip(window.size, window.stride)]
  counts = [-(-(extent + pad[0]) // s) for extent, pad, s in zip((height, width), window.padding, window.stride)]
  margins = [
    (back, max(0, count - have)) for back, count, have in zip(reach, counts, outputs[0].shape[1:3], strict=True)
  ]
  widened = [pad_images(array, (margins[0], margins[1]), value) for array, value in zip(outputs, fill, strict=True)]
  total: Array | None = None
  for row_phase in range(window.stride[0]):
    for column_phase in range(window.stride[1]):
      phase: Array | None = None
      for i in range(row_phase, window.size[0], window.stride[0]):
        for j in range(column_phase, window.size[1], window.stride[1]):
          top, left = reach[0] - i // window.stride[0], reach[1] - j // window.stride[1]
          stop = (batch, top + counts[0], left + counts[1], channels)
          sent = contribution((i, j), tuple(lax.slice(array, (0, top, left, 0), stop) for array in widened))
          phase = sent if phase is None else phase + sent
      if phase is None:  # a stride larger than the window leaves inputs that no window sees
        continue
      # Inside one loop with what uses it, each element would choose among the phases' sums.
      phase = lax.optimization_barrier(phase)
      interleave = [(0, 0, 0)]
      for axis, start in enumerate((row_phase, column_phase)):
        low = start - window.padding[axis][0]
        high = shape[axis + 1] - low - (counts[axis] - 1) * window.stride[axis] - 1
        interleave.append((low, high, window.stride[axis] - 1))
      spread = lax.pad(phase, jnp.zeros((), phase.dtype), [*interleave, (0, 0, 0)])
      total = spread if total is None else total + spread
  assert total is not None
  return total


def native_convolution(images: Array, kernel: Array, window: Window, precision: Any) -> Array:
  """The convolution that XLA has: images f32[b,h,w,c], kernel f32[kh,kw,c / groups,d] -> f32[b,oh,ow,d]."""
  return lax.conv_general_dilated(
    images,
    kernel,
    window.stride,
    window.padding,
    dimension_numbers=LAYOUT,
    feature_group_count=images.shape[3] // kernel.shape[2],
    precision=precision,
  )


def sum_over_parts(
  function: Callable[[Array, Array], Array],
  images: Array,
  cotangent: Array,
  bytes_of_image: int,
  cached: int,
  *,
  fewest: int = 1,
  smallest: int = 1,
) -> Array:
  """function(images, cotangent), a sum over images, as a sum over equal parts of the batch that are taken one after the other.

  Args:
    function: `(x [b/n,...], g [b/n,...]) -> sum`; not a convolution, which inside a loop is slow on CPUs.
    images: f32[b,...].
    cotangent: f32[b,...].
    bytes_of_image: what is made of one image.
    cached: bytes that stay near a core; there are as few parts as let what is made of a part fit.
    fewest: parts, where the batch can be divided at all.
    smallest: images in a part, which may then take more than `cached`.
  """
  batch = images.shape[0]
  counts = [n for n in range(fewest, batch // smallest + 1) if batch % n == 0]
  parts = next((n for n in counts if bytes_of_image * (batch // n) <= cached), counts[-1] if counts else 1)
  if parts == 1:
    return function(images, cotangent)
  split = tuple(array.reshape(parts, -1, *array.shape[1:]) for array in (images, cotangent))
  shape = jax.eval_shape(function, *(array[0] for array in split))
  # The zero of the cotangent makes the start vary over devices as the terms do.
  start = jnp.zeros(shape.shape, shape.dtype) + 0.0 * cotangent[(0,) * cotangent.ndim]
  return lax.scan(lambda total, part: (total + function(*part), None), start, split)[0]
