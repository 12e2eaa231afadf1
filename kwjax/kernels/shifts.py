"""Gradient of a convolution of few features to its kernel as one matrix product of shifted copies, on CPUs.

XLA makes it a convolution whose window is the whole image, and writes both factors transposed first. A product over all windows
would copy each pixel of the images kh kw times. Shifting the images along their rows and the cotangent along its columns
copies them kw and kh times, and every entry of the product is one of the gradient; a cotangent of few features is
shifted alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from kwjax.kernels.windows import Window, image_parts, pad_images, sum_over_parts

_WIDEST = 31  # channels and features, from which on Winograd's form takes as long
_FEW = 32  # features that are shifted alone where twice as many channels meet them
_FEWEST_PIXELS = 400  # of an image, below which that brings nothing
_CACHED_PART = 4 << 20  # bytes of shifted copies that stay near a core


def is_worthwhile(images: Sequence[int], kernel: Sequence[int], window: Window) -> bool:
  """Whether it beats the convolution: 3x3, stride 1, few features, and the copies of one image fit the cache.

  Args:
    images: shape (b, h, w, c).
    kernel: shape (kh, kw, c, d).
    window: geometry of the convolution.
  """
  channels, features = kernel[2:]
  is_narrow = max(channels, features) <= _WIDEST
  has_few_features = features <= _FEW and 2 * features <= channels and math.prod(images[1:3]) >= _FEWEST_PIXELS
  return (
    window.size == (3, 3)
    and window.stride == (1, 1)
    and (is_narrow or has_few_features)
    and _bytes_of_copies(images, kernel) <= _CACHED_PART
  )


def _bytes_of_copies(images: Sequence[int], kernel: Sequence[int]) -> int:
  """Of one image."""
  tall, wide, channels, features = kernel
  return 4 * math.prod(images[1:3]) * min(wide * channels + tall * features, tall * wide * features)


def kernel_gradient(images: Array, cotangent: Array, window: Window, precision: Any) -> Array:
  """dk[i,j,c,d] = sum_bhw x[b, h, w + j - left, c] g[b, h - i + top, w, d] for a convolution of stride 1.

  h counts rows of the images and w columns of the cotangent; with the cotangent shifted alone it is x[b, h, w, c] and
  g[b, h - i + top, w - j + left, d]. The batch is taken in parts whose copies stay in the cache. On each of two cores,
  64 images of 32x32x16 take 3.3 ms (XLA's convolution 5.5 ms) and 8 of 56x56x128 to 32 features 14 ms (24 ms).

  Args:
    images: f32[b,h,w,c].
    cotangent: f32[b,oh,ow,d], of the convolution's result.
    window: geometry of the convolution.
    precision: of the matrix product.

  Returns: f32[kh,kw,c,d].
  """
  tall, wide = window.size
  (height, width, channels), (_, columns, features) = images.shape[1:], cotangent.shape[1:]
  # A zero made from the cotangent: XLA could otherwise copy the images of all layers before the first product.
  zero = 0.0 * cotangent[0, 0, 0, 0]
  # Row h of the images meets rows h + top - kh + 1 to h + top of the cotangent, as in the gradient to the images.
  by_rows, by_columns = window.mirrored.padding
  alone = tall * wide * features <= wide * channels + tall * features

  def summed(x: Array, g: Array) -> Array:
    """The product over some of the images: f32[kw * c, kh * d], or f32[kh * kw * d, c] with the cotangent shifted alone."""
    g = pad_images(g, (by_rows, by_columns if alone else (0, 0)), zero)
    by_row = [lax.slice_in_dim(g, tall - 1 - i, tall - 1 - i + height, axis=1) for i in range(tall)]
    if alone:
      shifted = [lax.slice_in_dim(g, wide - 1 - j, wide - 1 - j + width, axis=2) for g in by_row for j in range(wide)]
      factors = jnp.concatenate(shifted, 3), x
    else:
      x = pad_images(x, ((0, 0), window.padding[1]), zero)
      by_column = [lax.slice_in_dim(x, j, j + columns, axis=2) for j in range(wide)]
      factors = jnp.concatenate(by_column, 3), jnp.concatenate(by_row, 3)
    first, second = (factor.reshape(-1, factor.shape[3]) for factor in factors)
    return lax.dot_general(first, second, (((0,), (0,)), ((), ())), precision)

  parts = image_parts(images.shape[0], _bytes_of_copies(images.shape, (tall, wide, channels, features)), _CACHED_PART)
  product = sum_over_parts(summed, images, cotangent, parts)
  if alone:
    return product.reshape(tall, wide, features, channels).swapaxes(2, 3)
  return product.reshape(wide, channels, tall, features).transpose(2, 0, 1, 3)
