"""Max pooling as the largest of shifted images, and its gradient in the same manner.

XLA's CPU backend runs the native gradient, `select_and_scatter`, as scalar code.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from kwjax.kernels.windows import Window, pad_images, scatter_taps, tap_of_padded


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(images: Array, window: Window) -> Array:
  """Largest value of each window, the padding never: f32[b,h,w,c] -> f32[b,oh,ow,c]; reverse mode only.

  Among equal values (after a ReLU, windows of zeros are ties) the gradient goes to the first one in row-major order, as
  in PyTorch and in XLA's `select_and_scatter`, not in equal parts to all of them.
  """
  return functools.reduce(jnp.maximum, _taps(images, window))


def _forward(images: Array, window: Window) -> tuple[Array, Array]:
  return max_pool(images, window), images


def _backward(window: Window, images: Array, cotangent: Array) -> tuple[Array]:
  first, *others = _taps(images, window)
  largest, winner = first, jnp.zeros(first.shape, jnp.int32)
  for number, seen in enumerate(others, 1):
    winner = jnp.where(seen > largest, number, winner)
    largest = jnp.maximum(largest, seen)

  def sent_back(tap: tuple[int, int], outputs: tuple[Array, ...]) -> Array:
    sent, won_by = outputs
    return jnp.where(won_by == tap[0] * window.size[1] + tap[1], sent, 0)

  return (scatter_taps(images.shape, window, (cotangent, winner), (0, -1), sent_back),)


max_pool.defvjp(_forward, _backward)


def _taps(images: Array, window: Window) -> list[Array]:
  """What each tap sees [b,oh,ow,c], minus infinity beyond the images."""
  padded, counts = pad_images(images, window.padding, -jnp.inf), window.output_size(*images.shape[1:3])
  return [tap_of_padded(padded, window, tap, *counts) for tap in window.taps]
