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

from kwjax.cpu import has_wide_vectors
from kwjax.models.windows import image_parts, pad_images, sum_over_parts

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
_FROM_OUTPUTS = tuple(zip(*_TO_OUTPUTS, strict=True))
_CHANNELS_A_TILE = 4  # beyond which the transformed kernels take more memory than the time they save is worth
_MANY_TILES = 1024  # from which 64 channels are enough with AVX-512 too
_FEWEST = 32  # channels, below which the transforms cost what the products save
_LARGEST_PRODUCTS = 10 << 20  # bytes of the transformed kernel, beyond which AVX-512 waits for memory
_CACHED_PART = 1 << 20  # bytes of transformed images that stay near a core


def is_worthwhile(images: Sequence[int], kernel: Sequence[int]) -> bool:
  """Whether it beats the direct sum: many channels to share the sums of slices, many tiles to share the kernel's.

  With few tiles the transformed kernels, four times as large as they were, outgrow the images by far.

  Args:
    images: shape (b, h, w, c) of the result.
    kernel: shape (kh, kw, c, d).
  """
  tiles = _tile_count(images)
  fewest = 128 if has_wide_vectors() and tiles < _MANY_TILES else 64
  return tuple(kernel[:2]) == (3, 3) and min(kernel[2:]) >= fewest and tiles * _CHANNELS_A_TILE >= max(kernel[2:])


def has_fast_kernel_gradient(images: Sequence[int], kernel: Sequence[int]) -> bool:
  """Whether `kernel_gradient` beats the convolution.

  Where many channels meet few features, as in a DenseNet, it gains nothing and takes minutes to compile.

  Args:
    images: shape (b, h, w, c).
    kernel: shape (kh, kw, c, d).
  """
  fewer, more = sorted(kernel[2:])
  products = 4 * _INPUTS**2 * fewer * more
  return (
    tuple(kernel[:2]) == (3, 3)
    and fewer >= _FEWEST
    and more <= 2 * fewer
    and (products <= _LARGEST_PRODUCTS or not has_wide_vectors())
  )


def _tile_count(images: Sequence[int]) -> int:
  return images[0] * -(-images[1] // _TILE) * -(-images[2] // _TILE)


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
  rows, columns = height + sum(padding[0]) - 2, width + sum(padding[1]) - 2
  tall, wide = -(-rows // _TILE), -(-columns // _TILE)
  padded = _padded(images, padding, tall * _TILE - rows, wide * _TILE - columns, jnp.float32(0.0))
  inputs = jnp.stack(_tiles(_TO_INPUTS, padded, tall, wide)).reshape(_INPUTS**2, -1, channels)
  # The mirrored and transposed kernel is never made: a copy of it would take longer than the products.
  mirrored = np.asarray(_TO_KERNEL, np.float32)[:, ::-1]
  weights = (np.kron(mirrored, mirrored) @ kernel.reshape(9, -1)).reshape(_INPUTS**2, features, channels)
  products = lax.dot_general(inputs, weights, (((2,), (2,)), ((0,), (0,))))
  grid = products.reshape(_INPUTS, _INPUTS, batch, tall, wide, features)
  lines = _combine(_TO_OUTPUTS, [grid[i] for i in range(_INPUTS)])
  pixels = [jnp.stack(_combine(_TO_OUTPUTS, [line[j] for j in range(_INPUTS)]), axis=3) for line in lines]
  whole = jnp.stack(pixels, axis=2).reshape(batch, tall * _TILE, wide * _TILE, features)
  return whole[:, :rows, :columns]


def kernel_gradient(images: Array, cotangent: Array, padding: tuple[tuple[int, int], tuple[int, int]]) -> Array:
  """Gradient of a 3x3 convolution of stride 1 to its kernel: dk[i,j,c,d] = sum_bhw x[b, h + i - top, w + j - left, c] g[b,h,w,d].

  dk = G^T [sum_tiles (B^T x B) * (A g A^T)] G, the transpose of Eq. (12) in its kernel. XLA makes it a convolution whose window
  is the whole image, at a half to a quarter of this form's rate.

  Args:
    images: f32[b,h,w,c].
    cotangent: f32[b,oh,ow,d], of the convolution's result.
    padding: ((top, bottom), (left, right)) zeros of the convolution, in pixels.

  Returns: f32[3,3,c,d].
  """
  batch, rows, columns, features = cotangent.shape
  channels = images.shape[3]
  tall, wide = -(-rows // _TILE), -(-columns // _TILE)
  below, beside = tall * _TILE - rows, wide * _TILE - columns
  # A zero made from the cotangent: XLA would otherwise transform the images of all layers before the first product.
  zero = 0.0 * cotangent[0, 0, 0, 0]

  def summed(x: Array, g: Array) -> Array:
    """Products of the transformed tiles of some of the images, summed over tiles: f32[36,c,d]."""
    inputs = _tiles(_TO_INPUTS, _padded(x, padding, below, beside, zero), tall, wide)
    outputs = _tiles(_FROM_OUTPUTS, _padded(g, ((0, 0), (0, 0)), below, beside, zero), tall, wide)
    left = jnp.stack(inputs).reshape(_INPUTS**2, -1, channels)
    right = jnp.stack(outputs).reshape(_INPUTS**2, -1, features)
    return lax.dot_general(left, right, (((1,), (1,)), ((0,), (0,))))

  # Parts not smaller than the products, which every part adds to, so that a batch of few tiles is not divided.
  cached = max(_CACHED_PART, 4 * _INPUTS**2 * channels * features)
  parts = image_parts(batch, 4 * _INPUTS**2 * tall * wide * max(channels, features), cached)
  products = sum_over_parts(summed, images, cotangent, parts)
  transform = np.asarray(_TO_KERNEL, np.float32)
  gradient = jnp.asarray(np.kron(transform, transform).T) @ products.reshape(_INPUTS**2, -1)
  return gradient.reshape(3, 3, channels, features)


def _padded(
  images: Array, padding: tuple[tuple[int, int], tuple[int, int]], below: int, beside: int, zero: Array
) -> Array:
  """Images with zeros around them, `below` and `beside` of which fill the last tiles."""
  (top, bottom), (left, right) = padding
  return pad_images(images, ((top, bottom + below), (left, right + beside)), zero)


def _tiles(matrix: Sequence[Sequence[float]], padded: Array, tall: int, wide: int) -> list[Array]:
  """Matrix t matrix^T of every tile t: its entries in row-major order, each [b,tall,wide,c]."""

  def every_fourth(array: Array, axis: int, start: int, count: int) -> Array:
    return lax.slice_in_dim(array, start, start + _TILE * (count - 1) + 1, _TILE, axis)

  size = range(len(matrix[0]))
  down = _combine(matrix, [every_fourth(padded, 1, i, tall) for i in size])
  return [tile for row in down for tile in _combine(matrix, [every_fourth(row, 2, j, wide) for j in size])]


def _combine(matrix: Sequence[Sequence[float]], arrays: Sequence[Array]) -> list[Array]:
  """Matrix @ arrays, with the many zeros left out."""
  return [
    functools.reduce(operator.add, (a if m == 1 else m * a for m, a in zip(row, arrays, strict=True) if m))
    for row in matrix
  ]
