"""Winograd's minimal filtering: a 3x3 convolution with a quarter of the multiplications, on CPUs.

Four by four outputs are made from a tile of six by six inputs by 36 products a pair of channels, where the sum itself
takes 144. The products are 36 matrix products over all tiles; what comes before and after are sums of slices, which XLA's
CPU backend turns into vectorised loops. Rounding errors are about ten times those of the direct sum (3e-5 of the
result's scale), so it serves gradients, never a network's output.

Source: Lavin & Gray (2016), "Fast algorithms for convolutional neural networks", F(4x4, 3x3).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_TILE, _INPUTS = 4, 6
_TO_INPUTS = (
  (4, 0, -5, 0, 1, 0),
  (0, -4, -4, 1, 1, 0),
  (0, 4, -4, -1, 1, 0),
  (0, -2, -1, 2, 1, 0),
  (0, 2, -1, -2, 1, 0),
  (0, 4, 0, -5, 0, 1),
)
_TO_KERNEL = (
  (1 / 4, 0, 0),
  (-1 / 6, -1 / 6, -1 / 6),
  (-1 / 6, 1 / 6, -1 / 6),
  (1 / 24, 1 / 12, 1 / 6),
  (1 / 24, -1 / 12, 1 / 6),
  (0, 0, 1),
)
_TO_OUTPUTS = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def is_worthwhile(images: Sequence[int], kernel: Sequence[int]) -> bool:
  """Whether it beats the direct sum: many channels to share the sums of slices, many tiles to share the kernel's.

  With fewer tiles than channels the transformed kernels, four times as large as they were, would outgrow the images: it is
  still faster there, but takes half as much memory again.

  Args:
    images: shape (b, h, w, c) of the result.
    kernel: shape (kh, kw, c, d).
  """
  tiles = images[0] * -(-images[1] // _TILE) * -(-images[2] // _TILE)
  return tuple(kernel[:2]) == (3, 3) and min(kernel[2:]) >= 64 and tiles >= max(kernel[2:])


def transposed_convolve(images: Array, kernel: Array, padding: tuple[tuple[int, int], tuple[int, int]]) -> Array:
  """Convolution of stride 1 with a mirrored kernel: y[b,h,w,c] = sum_ijd x[b, h + i - top, w + j - left, d] k[2-i,2-j,c,d].

  This is the gradient to the images of a convolution with k and padding (2 - top, 2 - bottom), (2 - left, 2 - right).

  Y = A^T [(G k G^T) * (B^T x B)] A for each tile x of 6x6 inputs, Lavin & Gray (2016), Eq. (12).

  Args:
    images: f32[b,h,w,d].
    kernel: f32[3,3,c,d].
    padding: ((top, bottom), (left, right)) zeros, in pixels.

  Returns: f32[b,oh,ow,c].
  """
  batch, height, width, channels = images.shape
  features = kernel.shape[2]
  (top, bottom), (left, right) = padding
  rows, columns = height + top + bottom - 2, width + left + right - 2
  tall, wide = -(-rows // _TILE), -(-columns // _TILE)
  fill = ((0, 0), (top, bottom + tall * _TILE - rows), (left, right + wide * _TILE - columns), (0, 0))
  padded = jnp.pad(images, fill)

  def every_fourth(array: Array, axis: int, start: int, count: int) -> Array:
    return lax.slice_in_dim(array, start, start + _TILE * (count - 1) + 1, _TILE, axis)

  down = _combine(_TO_INPUTS, [every_fourth(padded, 1, i, tall) for i in range(_INPUTS)])
  across = [_combine(_TO_INPUTS, [every_fourth(row, 2, j, wide) for j in range(_INPUTS)]) for row in down]
  inputs = jnp.stack([tile for row in across for tile in row]).reshape(_INPUTS**2, -1, channels)
  # The mirrored and transposed kernel is never made: a copy of it would take longer than the products.
  mirrored = np.asarray(_TO_KERNEL, np.float32)[:, ::-1]
  weights = (np.kron(mirrored, mirrored) @ kernel.reshape(9, -1)).reshape(_INPUTS**2, features, channels)
  products = lax.dot_general(inputs, weights, (((2,), (2,)), ((0,), (0,))))
  grid = products.reshape(_INPUTS, _INPUTS, batch, tall, wide, features)
  lines = _combine(_TO_OUTPUTS, [grid[i] for i in range(_INPUTS)])
  pixels = [jnp.stack(_combine(_TO_OUTPUTS, [line[j] for j in range(_INPUTS)]), axis=3) for line in lines]
  whole = jnp.stack(pixels, axis=2).reshape(batch, tall * _TILE, wide * _TILE, features)
  return whole[:, :rows, :columns]


def _combine(matrix: Sequence[Sequence[float]], arrays: Sequence[Array]) -> list[Array]:
  """Matrix @ arrays, with the many zeros left out."""
  return [
    functools.reduce(operator.add, (a if m == 1 else m * a for m, a in zip(row, arrays, strict=True) if m))
    for row in matrix
  ]
