"""Convolutions of few pixels by a large kernel as matrix products, one a tap, on CPUs.

With fewer pixels than channels and features the kernel is what has to be read, and for the gradient to the images XLA writes it
transposed first. 8 images of 7x7x512 on each of two cores: 11.0 ms where XLA's convolution takes 13.4 ms, and 10.8 ms
for the gradient where it takes 16.4.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from kwjax.models.windows import Window, pad_images, tap_of_padded

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
  rows, columns = window.output_size(*images.shape[1:3])
  padded = pad_images(images, window.padding)
  seen = jnp.concatenate([tap_of_padded(padded, window, tap, rows, columns) for tap in window.taps], 3)
  matrix = kernel.reshape(-1, kernel.shape[3])
  product = lax.dot(seen.reshape(-1, matrix.shape[0]), matrix, precision=precision)
  return product.reshape(images.shape[0], rows, columns, -1)


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
  return _sum_of_products(
    cotangent,
    window.mirrored,
    lambda g, i, j: lax.dot_general(g, kernel[last[0] - i, last[1] - j], transposed, precision),
  )


def _sum_of_products(images: Array, window: Window, product: Callable[[Array, int, int], Array]) -> Array:
  """Sum over taps of `product(what the tap sees [b * oh * ow, c], i, j)`, as images."""
  rows, columns = window.output_size(*images.shape[1:3])
  padded = pad_images(images, window.padding)
  terms = [
    product(tap_of_padded(padded, window, (i, j), rows, columns).reshape(-1, images.shape[3]), i, j)
    for i, j in window.taps
  ]
  return functools.reduce(operator.add, terms).reshape(images.shape[0], rows, columns, -1)
