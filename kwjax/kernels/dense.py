"""Dense convolutions that are fast on CPUs too: narrow ones, and wide or strided ones with faster gradients.

One of up to 16 features leaves the vector units of XLA's CPU backend half empty: with neighbouring pixels as further features it
runs two to five times as fast, its products by zero included. The gradients of wide 3x3 ones of stride 1 take half the time by
Winograd's algorithm, those of strided ones to their kernels a third to two thirds by a matrix product. Few pixels meet a large
kernel in products too, and strided ones of RGB images are a loop of their own. Other platforms keep the native convolution.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kwjax.kernels import im2col, products, shifts, stem, winograd
from kwjax.kernels.windows import Window, native_convolution

_NARROW = 16  # channels and features, up to which outputs are grouped


def is_narrow(kernel: Array) -> bool:
  """Whether a kernel f32[kh,kw,c,d] has so few channels and features that a CPU computes several outputs at once."""
  return max(kernel.shape[2:]) <= _NARROW


def neighbours(channels: int, features: int) -> int:
  """How many neighbouring outputs of a narrow convolution are computed as one with more features: a power of two up to 8.

  So many that there are features for whole vectors, 32 of them; 64 where a window holds few values to multiply.
  """
  wanted = 64 if channels <= 4 else 32
  count = next((n for n in (8, 4, 2) if n * features <= wanted), 1)
  return count if count * features % 8 == 0 else 1


def _grouped(images: Array, kernel: Array, window: Window, precision: Any) -> Array:
  """A narrow convolution of stride 1 with `neighbours` outputs of a row as features of one window, `stride` as far apart.

  Its kernel holds the given one n times, each a pixel further to the right than the one before. Of the products a share of
  kw / (kw + n - 1) is not by zero; the results lie in memory as they should.
  """
  count = neighbours(*kernel.shape[2:]) if is_narrow(kernel) and set(window.stride) == {1} else 1
  columns = window.output_size(*images.shape[1:3])[1]
  if count == 1 or columns < count:
    return native_convolution(images, kernel, window, precision)
  wide = [jnp.pad(kernel, ((0, 0), (i, count - 1 - i), (0, 0), (0, 0))) for i in range(count)]
  missing = -columns % count
  (left, right) = window.padding[1]
  grouped = Window(
    (window.size[0], window.size[1] + count - 1), (1, count), (window.padding[0], (left, right + missing))
  )
  y = native_convolution(images, jnp.concatenate(wide, 3), grouped, precision)
  y = y.reshape(*y.shape[:2], columns + missing, kernel.shape[3])
  return y[:, :, :columns] if missing else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def dense(images: Array, kernel: Array, window: Window, precision: Any, fewer_products: bool = False) -> Array:
  """Dense convolution: images f32[b,h,w,c], kernel f32[kh,kw,c,d] -> f32[b,oh,ow,d]; reverse mode only.

  Its gradient, and with `fewer_products` its value, is Winograd's where that pays, unless a precision other than None is
  asked for: the rounding errors are ten times larger.
  """
  return lax.platform_dependent(
    images,
    kernel,
    cpu=lambda x, k: _on_cpu(x, k, window, precision, fewer_products and precision is None),
    default=lambda x, k: native_convolution(x, k, window, precision),
  )


def _on_cpu(images: Array, kernel: Array, window: Window, precision: Any, fewer_products: bool) -> Array:
  if fewer_products and set(window.stride) == {1} and winograd.is_worthwhile(images.shape, kernel.shape):
    return winograd.convolve(images, kernel, window.padding)
  if products.is_worthwhile(images.shape, kernel.shape, window):
    return products.convolve(images, kernel, window, precision)
  if stem.is_worthwhile(kernel.shape, window):
    return stem.convolve(images, kernel, window)
  return _grouped(images, kernel, window, precision)


def _dense_forward(
  images: Array, kernel: Array, window: Window, precision: Any, fewer_products: bool
) -> tuple[Array, tuple[Array, Array]]:
  return dense(images, kernel, window, precision, fewer_products), (images, kernel)


def _dense_backward(
  window: Window, precision: Any, fewer_products: bool, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
  images, kernel = residuals
  if set(window.stride) != {1}:
    return _strided_backward(images, kernel, window, precision, cotangent)

  def mirrored(k: Array, g: Array) -> Array:
    return dense(g, jnp.swapaxes(k[::-1, ::-1], 2, 3), window.mirrored, precision, fewer_products)

  if precision is None and winograd.is_worthwhile(images.shape, kernel.shape):
    padding = window.mirrored.padding
    to_images = lax.platform_dependent(
      kernel, cotangent, cpu=lambda k, g: winograd.transposed_convolve(g, k, padding), default=mirrored
    )
  elif products.is_worthwhile(images.shape, kernel.shape, window):
    to_images = lax.platform_dependent(
      kernel, cotangent, cpu=lambda k, g: products.transposed_convolve(g, k, window, precision), default=mirrored
    )
  else:
    to_images = mirrored(kernel, cotangent)

  def transposed(x: Array, g: Array) -> Array:
    return _native_kernel_gradient(x, g, kernel, window, precision)

  if precision is None and winograd.has_fast_kernel_gradient(images.shape, kernel.shape):
    to_kernel = lax.platform_dependent(
      images, cotangent, cpu=lambda x, g: winograd.kernel_gradient(x, g, window.padding), default=transposed
    )
  elif shifts.is_worthwhile(images.shape, kernel.shape, window):
    to_kernel = lax.platform_dependent(
      images, cotangent, cpu=lambda x, g: shifts.kernel_gradient(x, g, window, precision), default=transposed
    )
  else:
    to_kernel = transposed(images, cotangent)
  return to_images, to_kernel


def _strided_backward(
  images: Array, kernel: Array, window: Window, precision: Any, cotangent: Array
) -> tuple[Array, Array]:
  (to_images,) = jax.linear_transpose(lambda x: native_convolution(x, kernel, window, precision), images)(cotangent)
  to_kernel = lax.platform_dependent(
    images,
    cotangent,
    cpu=lambda x, g: im2col.kernel_gradient(x, g, window, precision),
    default=lambda x, g: _native_kernel_gradient(x, g, kernel, window, precision),
  )
  return to_images, to_kernel


def _native_kernel_gradient(images: Array, cotangent: Array, kernel: Array, window: Window, precision: Any) -> Array:
  return jax.linear_transpose(lambda k: native_convolution(images, k, window, precision), kernel)(cotangent)[0]


dense.defvjp(_dense_forward, _dense_backward)
