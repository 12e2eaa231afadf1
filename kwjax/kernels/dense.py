"""Dense convolutions: which form each of the value and the two gradients takes.

A convolution of up to 16 channels and features leaves the vectors of XLA's CPU backend half empty: with neighbouring pixels as
further features it runs two to five times as fast, its products by zero included. The other forms have files of their own.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kwjax.kernels import im2col, winograd
from kwjax.kernels.windows import Window, native_convolution

_NARROW = 16  # channels and features, up to which outputs are grouped


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def dense(images: Array, kernel: Array, window: Window, precision: Any, fewer_products: bool = False) -> Array:
  """Dense convolution: images f32[b,h,w,c], kernel f32[kh,kw,c,d] -> f32[b,oh,ow,d]; reverse mode only.

  Its gradient, and with `fewer_products` its value, is Winograd's where that pays, unless a precision other than None is
  asked for: the rounding errors are ten times larger.
  """
  if fewer_products and precision is None and winograd.is_worthwhile(images, kernel, window):
    return winograd.convolve(images, kernel, window.padding)
  return _grouped(images, kernel, window, precision)


def _forward(
  images: Array, kernel: Array, window: Window, precision: Any, fewer_products: bool
) -> tuple[Array, tuple[Array, Array]]:
  return dense(images, kernel, window, precision, fewer_products), (images, kernel)


def _backward(
  window: Window, precision: Any, fewer_products: bool, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
  images, kernel = residuals
  native = functools.partial(native_convolution, window=window, precision=precision)
  if precision is None and winograd.is_worthwhile(images, kernel, window):
    to_images = winograd.transposed_convolve(cotangent, kernel, window.mirrored.padding)
  elif window.stride == (1, 1):
    to_images = dense(cotangent, jnp.swapaxes(kernel[::-1, ::-1], 2, 3), window.mirrored, precision, fewer_products)
  else:
    (to_images,) = jax.linear_transpose(lambda x: native(x, kernel), images)(cotangent)
  if precision is None and winograd.has_fast_kernel_gradient(kernel, window):
    to_kernel = winograd.kernel_gradient(images, cotangent, window.padding)
  elif im2col.has_fast_kernel_gradient(images, kernel, window):
    to_kernel = im2col.kernel_gradient(images, cotangent, window, precision)
  else:
    (to_kernel,) = jax.linear_transpose(lambda k: native(images, k), kernel)(cotangent)
  return to_images, to_kernel


dense.defvjp(_forward, _backward)


def _grouped(images: Array, kernel: Array, window: Window, precision: Any) -> Array:
  """The native convolution; of a narrow one of stride 1 `_neighbours` outputs of a row are features of one window.

  Its kernel holds the given one n times, each a pixel further to the right than the one before. Of the products a share of
  kw / (kw + n - 1) is not by zero; the results lie in memory as they should.
  """
  count = _neighbours(*kernel.shape[2:]) if window.stride == (1, 1) else 1
  columns = window.output_size(*images.shape[1:3])[1]
  if count == 1 or columns < count:
    return native_convolution(images, kernel, window, precision)
  wide = [jnp.pad(kernel, ((0, 0), (i, count - 1 - i), (0, 0), (0, 0))) for i in range(count)]
  missing = -columns % count
  rows, (left, right) = window.padding
  grouped = Window((window.size[0], window.size[1] + count - 1), (1, count), (rows, (left, right + missing)))
  y = native_convolution(images, jnp.concatenate(wide, 3), grouped, precision)
  return y.reshape(*y.shape[:2], columns + missing, -1)[:, :, :columns]


def _neighbours(channels: int, features: int) -> int:
  """As many as make features for whole vectors, 32 of them, or 64 where a window holds few values: a power of two up to 8."""
  if max(channels, features) > _NARROW:
    return 1
  wanted = 64 if channels <= 4 else 32
  count = next((n for n in (8, 4, 2) if n * features <= wanted), 1)
  return count if count * features % 8 == 0 else 1
