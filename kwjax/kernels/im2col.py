"""The gradient of a convolution to its kernel as one matrix product over all windows.

XLA makes it a convolution whose window is the whole image. Strided convolutions and those of few channels gain.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from kwjax.kernels.windows import Window, pad_images, sum_over_parts

_CACHED_PART = 1 << 20  # bytes of windows that stay near a core
_FEW = 32  # channels or features, up to which the kernel's gradient is a product at stride 1 too
_FEWEST_PIXELS = 400  # of an image, below which that brings nothing


def has_fast_kernel_gradient(images: Array, kernel: Array, window: Window) -> bool:
  """Whether `kernel_gradient` beats the convolution for images [b,h,w,c] and a kernel [kh,kw,c,d]."""
  fewer, more = sorted(kernel.shape[2:])
  is_narrow = more < _FEW or (fewer <= _FEW and 2 * fewer <= more and math.prod(images.shape[1:3]) >= _FEWEST_PIXELS)
  return set(window.stride) != {1} or (window.size == (3, 3) and is_narrow)


def kernel_gradient(images: Array, cotangent: Array, window: Window, precision: Any) -> Array:
  """dk[i,j,c,d] = sum_bhw x[b, h s + i - top, w s + j - left, c] g[b,h,w,d] as X^T g, X all windows, one a row.

  At stride 1 the roles may change: of few features and many channels the windows of the cotangent are the smaller matrix.

  Args:
    images: f32[b,h,w,c].
    cotangent: f32[b,oh,ow,d], of the convolution's result.
    window: geometry of the convolution.
    precision: of the matrix product.

  Returns: f32[kh,kw,c,d].
  """
  if window.stride == (1, 1) and cotangent.shape[3] < images.shape[3]:
    mirrored = _kernel_gradient(cotangent, images, window.mirrored, precision)
    return jnp.swapaxes(mirrored[::-1, ::-1], 2, 3)
  return _kernel_gradient(images, cotangent, window, precision)


def _kernel_gradient(images: Array, cotangent: Array, window: Window, precision: Any) -> Array:
  def product(x: Array, g: Array) -> Array:
    # A zero made from the cotangent: XLA could otherwise lay out the windows of all layers before the first product.
    matrix = windows_matrix(x, window, 0.0 * g[0, 0, 0, 0])
    return lax.dot_general(matrix, g.reshape(-1, g.shape[3]), (((0,), (0,)), ((), ())), precision)

  (tall, wide), channels = window.size, images.shape[3]
  bytes_of_windows = 4 * math.prod(cotangent.shape[1:3]) * tall * wide * channels
  found = sum_over_parts(product, images, cotangent, bytes_of_windows, _CACHED_PART)
  return found.reshape(wide, tall, channels, -1).swapaxes(0, 1)


def windows_matrix(images: Array, window: Window, zero: Array | float = 0.0) -> Array:
  """What each window sees, one a row, ordered by column, row and channel: f32[b,h,w,c] -> f32[b oh ow, kw kh c]."""
  (tall, wide), (down, right) = window.size, window.stride
  rows, columns = window.output_size(*images.shape[1:3])
  reach = ((rows - 1) * down + tall, (columns - 1) * right + wide)
  pads = [
    (low, size - low - extent)  # beyond the last window nothing is needed: a negative padding cuts it off
    for (low, _), size, extent in zip(window.padding, reach, images.shape[1:3], strict=True)
  ]
  padded = pad_images(images, (pads[0], pads[1]), zero)
  bands = [lax.slice_in_dim(padded, i, i + (rows - 1) * down + 1, down, 1) for i in range(tall)]
  # Made once, so that every column of windows copies whole runs of kh * c values instead of c.
  band = lax.optimization_barrier(jnp.concatenate(bands, 3))
  windows = [lax.slice_in_dim(band, j, j + (columns - 1) * right + 1, right, 2) for j in range(wide)]
  return jnp.concatenate(windows, 3).reshape(-1, wide * tall * images.shape[3])
