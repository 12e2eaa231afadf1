"""Depthwise convolutions as sums of shifted images, and their two gradients in the same manner.

XLA's CPU backend runs a convolution with as many groups as channels as scalar code; k * k shifted multiply-adds become one
vectorised loop.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from kwjax.kernels.windows import (
  Window,
  pad_images,
  scatter_taps,
  sum_over_parts,
  tap_of_padded,
)

_ROW_BLOCKS = 8  # of the kernel gradient: more make the loop longer to compile and no faster
_CACHED_PART = 15 << 20  # bytes of images and cotangents that stay near a core, in the cache that cores share
_FEWEST_IMAGES = 2  # in a part: loops over one image are not vectorized


def _shifted(images: Array, kernel: Array, window: Window) -> Array:
  """The convolution as a sum over taps of (shifted image) * (kernel tap).

  The image is padded once. Padding each product instead is faster for a layer on its own, but inside a network it makes
  XLA keep 2.5 times the memory for the backward pass and run 1.5 times slower.
  """
  rows, columns = window.output_size(images.shape[1], images.shape[2])
  padded = pad_images(images, window.padding)
  products = [tap_of_padded(padded, window, tap, rows, columns) * kernel[tap][0] for tap in window.taps]
  return functools.reduce(jnp.add, products)


def _shifted_kernel_gradient(images: Array, cotangent: Array, window: Window) -> Array:
  """Transpose of `_shifted` in its kernel: k'[i,j,0,c] = sum_bhw (tap (i,j) of the images) * cotangent.

  The batch in parts, so that every tap but the first reads from the cache, and what makes the cotangent is not computed anew
  for each: of 8 images of 56x56x144 on each of two cores 9.9 ms, as a whole 17 ms.
  """
  bytes_of_image = 4 * (math.prod(images.shape[1:]) + math.prod(cotangent.shape[1:]))
  gradient = functools.partial(_kernel_gradient_of_part, window=window)
  return sum_over_parts(gradient, images, cotangent, bytes_of_image, _CACHED_PART, fewest=2, smallest=_FEWEST_IMAGES)


def _kernel_gradient_of_part(images: Array, cotangent: Array, window: Window) -> Array:
  """`_shifted_kernel_gradient` of some of the images.

  Adding up blocks of rows for every tap inside one loop takes half the time of one reduction a tap, which would write
  each shifted image to memory first. Rows, because the batch may be spread over devices.
  """
  _, rows, columns, channels = cotangent.shape
  height = -(-rows // _ROW_BLOCKS)
  blocks = -(-rows // height)
  missing = blocks * height - rows
  (top, bottom), sides = window.padding
  padded = pad_images(images, ((top, bottom + missing * window.stride[0]), sides))
  cotangent = pad_images(cotangent, ((0, missing), (0, 0))) if missing else cotangent
  per_tap = []
  for tap in window.taps:
    seen = tap_of_padded(padded, window, tap, blocks * height, columns) * cotangent
    sums = functools.reduce(jnp.add, jnp.split(seen, blocks, axis=1))
    per_tap.append(sums[:, :, None])
  return jnp.sum(jnp.concatenate(per_tap, axis=2), axis=(0, 1, 3)).reshape(*window.size, 1, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(images: Array, kernel: Array, window: Window) -> Array:
  """Depthwise convolution: images f32[b,h,w,c], kernel f32[kh,kw,1,c] -> f32[b,oh,ow,c]; reverse mode only.

  y[b,h,w,c] = sum_ij x[b, h s + i - top, w s + j - left, c] k[i,j,0,c]
  """
  return _shifted(images, kernel, window)


def _depthwise_forward(images: Array, kernel: Array, window: Window) -> tuple[Array, tuple[Array, Array]]:
  return depthwise(images, kernel, window), (images, kernel)


def _depthwise_backward(window: Window, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
  images, kernel = residuals
  to_images = scatter_taps(images.shape, window, (cotangent,), (0.0,), lambda tap, seen: seen[0] * kernel[tap][0])
  return to_images, _shifted_kernel_gradient(images, cotangent, window)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)
