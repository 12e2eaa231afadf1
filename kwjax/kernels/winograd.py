"""Winograd's minimal filtering: a 3x3 convolution of stride 1 with a quarter of the multiplications.

Four by four outputs are made from a tile of six by six inputs by 36 products a pair of channels, where the sum itself
takes 144. The products are 36 matrix products over all tiles; what comes before and after are sums of slices, which XLA's
CPU backend turns into vectorised loops. Rounding errors are about ten times those of the direct sum (1e-5 of the
largest result), so it serves gradients and what is averaged over images, never a network's answer.

Source: Lavin & Gray (2016), "Fast algorithms for convolutional neural networks", F(4x4, 3x3).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kwjax.kernels.processor import has_wide_vectors
from kwjax.kernels.windows import Padding, Window, pad_images, sum_over_parts

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
_CHANNELS_A_TILE = 8  # beyond which the transformed kernels take more memory than the time they save is worth
_FEWEST = 32  # channels, below which the transforms cost what the products save
_LARGEST_PRODUCTS = 10 << 20  # bytes of the transformed kernel, beyond which AVX-512 waits for memory
_CACHED_PART = 1 << 20  # bytes of transformed images that stay near a core


def is_worthwhile(images: Array, kernel: Array, window: Window) -> bool:
  """Whether it beats the direct sum: many channels to share the sums of slices, many tiles to share the kernel's."""
  tiles = images.shape[0] * math.prod(-(-size // _TILE) for size in images.shape[1:3])
  return _fits(kernel, window) and tiles * _CHANNELS_A_TILE >= max(kernel.shape[2:])


def has_fast_kernel_gradient(kernel: Array, window: Window) -> bool:
  """Whether `kernel_gradient` beats the convolution."""
  products = 4 * _INPUTS**2 * math.prod(kernel.shape[2:])
  return _fits(kernel, window) and (products <= _LARGEST_PRODUCTS or not has_wide_vectors())


def _fits(kernel: Array, window: Window) -> bool:
  """Where many channels meet few features, as in a DenseNet, it gains nothing and takes minutes to compile."""
  fewer, more = sorted(kernel.shape[2:])
  return window.size == (3, 3) and window.stride == (1, 1) and fewer >= _FEWEST and more <= 2 * fewer


def convolve(images: Array, kernel: Array, padding: Padding) -> Array:
  """Convolution: images f32[b,h,w,c], kernel f32[3,3,c,d] -> f32[b,oh,ow,d].

  Y = A^T [(G k G^T) * (B^T x B)] A for each tile x of 6x6 inputs, Lavin & Gray (2016), Eq. (12).
  """
  return _filter(images, _transformed(kernel, _TO_KERNEL), padding, contracted=1)


def transposed_convolve(images: Array, kernel: Array, padding: Padding) -> Array:
  """Convolution with the mirrored kernel, its gradient to the images: f32[b,h,w,d], f32[3,3,c,d] -> f32[b,oh,ow,c]."""
  # The mirrored and transposed kernel is never made: a copy of it would take longer than the products.
  return _filter(images, _transformed(kernel, [row[::-1] for row in _TO_KERNEL]), padding, contracted=2)


def _transformed(kernel: Array, matrix: Sequence[Sequence[float]]) -> Array:
  """Matrix k matrix^T of a kernel f32[3,3,c,d]: f32[36,c,d]."""
  products = jnp.asarray(np.kron(matrix, matrix), kernel.dtype) @ kernel.reshape(9, -1)
  return products.reshape(_INPUTS**2, *kernel.shape[2:])


def _filter(images: Array, weights: Array, padding: Padding, contracted: int) -> Array:
  """Tiles of the images times a transformed kernel, f32[36,...], whose axis `contracted` runs over the channels."""
  batch, height, width, channels = images.shape
  rows, columns = height + sum(padding[0]) - 2, width + sum(padding[1]) - 2
  tall, wide = -(-rows // _TILE), -(-columns // _TILE)
  inputs = _tiles(_TO_INPUTS, images, padding, (rows, columns)).reshape(_INPUTS**2, -1, channels)
  products = lax.dot_general(inputs, weights, (((2,), (contracted,)), ((0,), (0,))))
  grid = products.reshape(_INPUTS, _INPUTS, batch, tall, wide, -1)
  # Stacked after either direction: XLA then writes the sums of the first, and does not make them anew for each of the second.
  lines = jnp.stack(_combine(_TO_OUTPUTS, grid), axis=3)
  whole = jnp.stack(_combine(_TO_OUTPUTS, lines), axis=4).reshape(batch, tall * _TILE, wide * _TILE, -1)
  return whole[:, :rows, :columns]


def kernel_gradient(images: Array, cotangent: Array, padding: Padding) -> Array:
  """Gradient of a convolution to its kernel: images f32[b,h,w,c], cotangent f32[b,oh,ow,d] -> f32[3,3,c,d].

  dk = G^T [sum_tiles (B^T x B) * (A g A^T)] G, the transpose of Eq. (12) in its kernel. XLA makes it a convolution whose window
  is the whole image, at a half to a quarter of this form's rate.
  """
  _, rows, columns, features = cotangent.shape
  channels = images.shape[3]
  # A zero made from the cotangent: XLA would otherwise transform the images of all layers before the first product.
  zero = 0.0 * cotangent[0, 0, 0, 0]

  def summed(x: Array, g: Array) -> Array:
    """Products of the transformed tiles of some of the images, summed over tiles: f32[36,c,d]."""
    left = _tiles(_TO_INPUTS, x, padding, (rows, columns), zero).reshape(_INPUTS**2, -1, channels)
    right = _tiles(_FROM_OUTPUTS, g, ((0, 0), (0, 0)), (rows, columns), zero).reshape(_INPUTS**2, -1, features)
    return lax.dot_general(left, right, (((1,), (1,)), ((0,), (0,))))

  # Parts not smaller than the products, which every part adds to, so that a batch of few tiles is not divided.
  cached = max(_CACHED_PART, 4 * _INPUTS**2 * channels * features)
  tiles = -(-rows // _TILE) * -(-columns // _TILE)
  bytes_of_tiles = 4 * _INPUTS**2 * tiles * max(channels, features)
  products = sum_over_parts(summed, images, cotangent, bytes_of_tiles, cached)
  gradient = jnp.asarray(np.kron(_TO_KERNEL, _TO_KERNEL).T, products.dtype) @ products.reshape(_INPUTS**2, -1)
  return gradient.reshape(3, 3, channels, features)


def _tiles(
  matrix: Sequence[Sequence[float]],
  images: Array,
  padding: Padding,
  outputs: tuple[int, int],
  zero: Array | float = 0.0,
) -> Array:
  """Matrix t matrix^T of every tile t of the padded images, which `outputs` rows and columns come from: [6,6,b,tall,wide,c]."""
  (rows, top, bottom), (columns, left, right) = ((size, *pads) for size, pads in zip(outputs, padding, strict=True))
  padded = pad_images(images, ((top, bottom - rows % -_TILE), (left, right - columns % -_TILE)), zero)

  def every_fourth(array: Array, axis: int, start: int, count: int) -> Array:
    return lax.slice_in_dim(array, start, start + _TILE * (count - 1) + 1, _TILE, axis)

  size = range(len(matrix[0]))
  # The sums of the first direction are written, once: without a stack XLA makes them anew for each of the second.
  down = jnp.stack(_combine(matrix, [every_fourth(padded, 1, i, -(-rows // _TILE)) for i in size]))
  return jnp.stack(_combine(matrix, [every_fourth(down, 3, j, -(-columns // _TILE)) for j in size]), axis=1)


def _combine(matrix: Sequence[Sequence[float]], arrays: Sequence[Array] | Array) -> list[Array]:
  """Matrix @ arrays, with the many zeros left out."""
  return [
    functools.reduce(operator.add, (a if m == 1 else m * a for m, a in zip(row, arrays, strict=True) if m))
    for row in matrix
  ]
