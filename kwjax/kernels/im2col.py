"""Convolutions as one matrix product over all their windows.

Two cases gain by it. The gradient to the kernel, which XLA makes a convolution whose window is the whole image: of a strided
convolution, or one of few channels. And few pixels that meet a large kernel, which XLA writes anew before it starts.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from kwjax.kernels.windows import Window, pad_images, sum_over_parts, tap_of_padded

_CACHED_PART = 1 << 20  # bytes of windows that stay near a core
_FEW = 32  # channels or features, up to which the kernel's gradient is a product at stride 1 too
_FEWEST_PIXELS = 400  # of an image, below which that brings nothing
_LARGE_KERNEL = 128  # channels and features of a kernel that is large
_LARGEST_WINDOW = 9  # positions


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


def has_few_pixels(images: Array, kernel: Array, window: Window) -> bool:
  """Whether products beat the convolution and its gradient to the images: fewer pixels than channels and features."""
  pixels = images.shape[0] * math.prod(window.output_size(*images.shape[1:3]))
  is_small = 1 < math.prod(window.size) <= _LARGEST_WINDOW
  return window.stride == (1, 1) and is_small and max(pixels, _LARGE_KERNEL) <= min(kernel.shape[2:])


def convolve(images: Array, kernel: Array, window: Window, precision: Any) -> Array:
  """The convolution as [x_11 x_12 ...] k, x_ij what tap (i, j) sees: one product, which reads the kernel as it lies."""
  seen = jnp.concatenate(_taps(images, window), 3)
  product = lax.dot(seen.reshape(-1, seen.shape[3]), kernel.reshape(-1, kernel.shape[3]), precision=precision)
  return product.reshape(*seen.shape[:3], -1)


def transposed_convolve(cotangent: Array, kernel: Array, window: Window, precision: Any) -> Array:
  """Gradient to the images: dx = sum_ij g_ij k[i,j]^T, g_ij the cotangent where tap (i, j) sees each pixel."""
  # Each tap's kernel is transposed by the product; as a convolution XLA would write all of it transposed first.
  transposed = (((3,), (1,)), ((), ()))
  mirrored = zip(window.taps, reversed(_taps(cotangent, window.mirrored)), strict=True)
  return functools.reduce(operator.add, (lax.dot_general(g, kernel[tap], transposed, precision) for tap, g in mirrored))


def _taps(images: Array, window: Window) -> list[Array]:
  padded = pad_images(images, window.padding)
  return [tap_of_padded(padded, window, tap, *window.output_size(*images.shape[1:3])) for tap in window.taps]
