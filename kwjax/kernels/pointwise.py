"""1x1 convolutions: matrix products, which the libraries of every platform are best at, but for those of few channels on CPUs.

A product of pixels by a kernel of few rows is short of arithmetic for a library, and what follows it, a BatchNorm and its
activation, reads all of it from memory once more. As a sum of products by single channels it is one loop with what follows,
which keeps the channels of a pixel in registers: of 112x112 pixels, 16 channels and 96 features with a BatchNorm half the time.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kwjax.cpu import has_wide_vectors

_FEW_CHANNELS = 32  # registers of a processor with AVX-512


def pointwise(pixels: Array, kernel: Array, precision: Any, preferred_element_type: Any) -> Array:
  """Pixels [n,c], kernel [c,d] -> [n,d]: y_nd = sum_c x_nc k_cd; of few channels, float32, defined in reverse mode only."""
  is_plain = pixels.dtype == kernel.dtype == jnp.float32 and preferred_element_type is None
  if is_plain and kernel.shape[0] <= _FEW_CHANNELS and has_wide_vectors():
    return _narrow(pixels, kernel, precision)
  return _product(pixels, kernel, precision, preferred_element_type)


def _product(pixels: Array, kernel: Array, precision: Any, preferred_element_type: Any = None) -> Array:
  return lax.dot_general(pixels, kernel, (((1,), (0,)), ((), ())), precision, preferred_element_type)


def _sum_over_channels(pixels: Array, kernel: Array) -> Array:
  products = [pixels[:, c : c + 1] * kernel[c] for c in range(kernel.shape[0])]
  # Each addition waits for the one before: two sums side by side wait half as long.
  half = -(-len(products) // 2)
  sums = [functools.reduce(jnp.add, part) for part in (products[:half], products[half:]) if part]
  return functools.reduce(jnp.add, sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow(pixels: Array, kernel: Array, precision: Any) -> Array:
  return lax.platform_dependent(pixels, kernel, cpu=_sum_over_channels, default=lambda x, k: _product(x, k, precision))


def _narrow_forward(pixels: Array, kernel: Array, precision: Any) -> tuple[Array, tuple[Array, Array]]:
  return _narrow(pixels, kernel, precision), (pixels, kernel)


def _narrow_backward(precision: Any, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
  # Both are products with many features, of pixels or to sum over.
  return jax.vjp(lambda x, k: _product(x, k, precision), *residuals)[1](cotangent)


_narrow.defvjp(_narrow_forward, _narrow_backward)
