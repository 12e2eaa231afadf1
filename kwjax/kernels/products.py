"""Convolutions of few pixels by a large kernel as a matrix product, their gradient to the images as one a tap, on CPUs.

With fewer pixels than channels and features the kernel is what has to be read, and for the gradient to the images XLA writes it
transposed first. 8 images of 7x7x512 on each of two cores: 10.1 ms where XLA's convolution takes 11.9 ms, 4 images 5.3 and
7.0 ms; 10.8 ms for the gradient of 8 where it takes 16.4.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from kwjax.kernels.windows import Window, pad_images, tap_of_padded

_FEWEST = 128  # channels and features, below which a product is too small to gain anything
_LARGEST_WINDOW = 9  # one product a tap


def is_worthwhile(images: Sequence[int], kernel: Sequence[int], window: Window) -> bool:
  """Whether products beat the convolution and its gradient to the images: stride 1, fewer pixels than channels and features.

  Args:
    images: shape (b, h, w, c).
    kernel: shape (kh, kw, c, d).
    window: geometry of the convolution.
  """
  pixels = images[0] * math.prod(window.output_size(*images[1:3]))
  return (
    window.stride == (1, 1)
    and 1 < math.prod(window.size) <= _LARGEST_WINDOW
    and max(pixels, _FEWEST) <= min(kernel[2:])
  )


def convolve(images: Array, kernel: Array, window: Window, precision: Any) -> Array:
  """The convolution [x_11 x_12 ...] k, x_ij the pixels that tap (i, j) sees, one a row, and k the kernel as one matrix.

  One product reads the kernel as it lies; one a tap would copy its part of the kernel first.

  Args:
    images: f32[b,h,w,c].
    kernel: f32[kh,kw,c,d].
    window: geometry of the convolution, of stride 1.
    precision: of the products.

  Returns: f32[b,oh,ow,d].
  """
  seen, matrix = jnp.concatenate(_taps(images, window), 3), kernel.reshape(-1, kernel.shape[3])
  product = lax.dot(seen.reshape(-1, matrix.shape[0]), matrix, precision=precision)
  return product.reshape(*seen.shape[:3], -1)


def transposed_convolve(cotangent: Array, kernel: Array, window: Window, precision: Any) -> Array:
  """Gradient to the images: dx = sum_ij g_ij k[i,j]^T, g_ij the cotangent where tap (i, j) sees each pixel.

  Args:
    cotangent: f32[b,oh,ow,d], of the convolution's result.
    kernel: f32[kh,kw,c,d].
    window: geometry of the convolution, of stride 1.
    precision: of the products.

  Returns: f32[b,h,w,c].
  """
  # Each tap's kernel is transposed by the product; as a convolution XLA would write all of it transposed first.
  last = (window.size[0] - 1, window.size[1] - 1)
  transposed = (((1,), (1,)), ((), ()))
  terms = [
    lax.dot_general(g.reshape(-1, g.shape[3]), kernel[last[0] - i, last[1] - j], transposed, precision)
    for (i, j), g in zip(window.taps, _taps(cotangent, window.mirrored), strict=True)
  ]
  rows, columns = window.mirrored.output_size(*cotangent.shape[1:3])
  return functools.reduce(operator.add, terms).reshape(cotangent.shape[0], rows, columns, -1)


def _taps(images: Array, window: Window) -> list[Array]:
  """What each tap sees, [b,oh,ow,c]."""
  padded = pad_images(images, window.padding)
  return [tap_of_padded(padded, window, tap, *window.output_size(*images.shape[1:3])) for tap in window.taps]
