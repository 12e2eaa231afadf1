"""Poolings of NHWC images whose gradients are fast on CPUs; on other platforms they are XLA's own."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from kwjax.kernels.windows import Window, scatter_taps


def max_pool(images: Array, size: int, stride: int, padding: int) -> Array:
  """Largest value of each window; the padding never wins.

  y[b,h,w,c] = max_ij x[b, h s + i - p, w s + j - p, c]

  Among equal values (after a ReLU, windows of zeros are ties) the gradient goes to the first one in row-major order, as
  in PyTorch and in XLA's select-and-scatter, not in equal parts to all of them.

  Args:
    images: f32[b,h,w,c].
    size: side of the window, in pixels.
    stride: distance between windows, in pixels.
    padding: pixels added on each of the four sides.

  Returns: f32[b,oh,ow,c], oh = (h + 2 padding - size) // stride + 1.
  """
  return _max_pool(images, Window((size, size), (stride, stride), ((padding, padding), (padding, padding))))


def global_average_pool(images: Array) -> Array:
  """Mean over all pixels: f32[b,h,w,c] -> f32[b,c]."""
  return jnp.mean(images, axis=(1, 2))


def _native(images: Array, window: Window) -> Array:
  return nn.max_pool(images, window.size, window.stride, window.padding)


def _taps(images: Array, window: Window) -> list[Array]:
  """What each tap sees [b,oh,ow,c], minus infinity beyond the images.

  Each is padded on its own: XLA then makes one loop of all and of the BatchNorm and activation before them, where images
  padded first are another array in memory: of 8 images of 112x112x64 on each of two cores 3.0 ms instead of 4.3.
  """
  return [_tap(images, window, tap) for tap in window.taps]


def _tap(images: Array, window: Window, tap: tuple[int, int]) -> Array:
  starts, stops, around = [0] * 4, list(images.shape), [(0, 0, 0)] * 4
  counts = window.output_size(*images.shape[1:3])
  for axis, (position, (low, _), stride, count) in enumerate(
    zip(tap, window.padding, window.stride, counts, strict=True), start=1
  ):
    # Output o sees pixel o * stride + position - low, which exists for o in [first, last].
    first = min(max(-(-(low - position) // stride), 0), count)
    last = min((images.shape[axis] - 1 + low - position) // stride, count - 1)
    seen = max(last - first + 1, 0)
    starts[axis] = first * stride + position - low if seen else 0
    stops[axis] = starts[axis] + (seen - 1) * stride + 1 if seen else 0
    around[axis] = (first, count - first - seen, 0)
  inside = lax.slice(images, starts, stops, (1, *window.stride, 1))
  return lax.pad(inside, jnp.asarray(-jnp.inf, images.dtype), around)


def _shifted(images: Array, window: Window) -> Array:
  return functools.reduce(jnp.maximum, _taps(images, window))


def _shifted_gradient(images: Array, cotangent: Array, window: Window) -> Array:
  """Sends each cotangent to the first tap that holds the window's maximum."""
  first, *others = _taps(images, window)
  largest, winner = first, jnp.zeros(first.shape, jnp.int32)
  for number, seen in enumerate(others, 1):
    winner = jnp.where(seen > largest, number, winner)
    largest = jnp.maximum(largest, seen)

  def sent_back(tap: tuple[int, int], outputs: tuple[Array, ...]) -> Array:
    sent, won_by = outputs
    return jnp.where(won_by == tap[0] * window.size[1] + tap[1], sent, 0)

  batch, height, width, channels = images.shape
  return scatter_taps((batch, height, width, channels), window, (cotangent, winner), (0, -1), sent_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(images: Array, window: Window) -> Array:
  return _shifted(images, window)


def _max_pool_forward(images: Array, window: Window) -> tuple[Array, Array]:
  return _max_pool(images, window), images


def _max_pool_backward(window: Window, images: Array, cotangent: Array) -> tuple[Array]:
  return (_shifted_gradient(images, cotangent, window),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
