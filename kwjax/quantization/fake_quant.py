"""Fake quantization: round to the levels of a grid and back, with the straight-through gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def fake_quant(x: Array, scale: Array | float, zero: Array | float, qmin: Array | float, qmax: Array | float) -> Array:
  r"""Nearest level of a uniform grid, with the straight-through gradient.

  $Q(x) = (\mathrm{clip}(\mathrm{round}(x / s + z), q_{min}, q_{max}) - z) \, s$;
  $\partial Q / \partial x = 1$ inside the range, else 0. The grid gets no gradient. Ties round to even.

  Args:
    x: f32[...], any shape and float type; the arithmetic is float32 (float64 for float64).
    scale: s > 0, distance of two levels in units of x; f32[] or broadcastable to x (one value for each channel).
    zero: z, the level of x = 0, real or integer; f32[] or broadcastable to x.
    qmin: lowest level, a number or a traced array; f32[] or broadcastable to x.
    qmax: highest level; f32[] or broadcastable to x.

  Returns:
    Like x.

  Source: Bengio, Leonard & Courville (2013), arXiv:1308.3432, the estimator; Haroush et al. (2020), 4.2, its use.
  """
  return _quantize(x, scale, zero, qmin, qmax)[0]


def nearest_level(x: Array, scale: Array | float, zero: Array | float) -> Array:
  """round(x (1 / scale) + zero), not clipped; float32, or float64 for float64."""
  # In float32: bfloat16 has 8 significant bits and would round twice. The product with the reciprocal is what PyTorch computes.
  # With a division, XLA on CPUs stores x / scale for the backward pass.
  return jnp.round(x.astype(jnp.promote_types(x.dtype, jnp.float32)) * (1.0 / scale) + zero)


def _quantize(x: Array, scale: Any, zero: Any, qmin: Any, qmax: Any) -> tuple[Array, Array]:
  x = jnp.asarray(x)
  level = nearest_level(x, scale, zero)
  inside = (level >= qmin) & (level <= qmax)
  return ((jnp.clip(level, qmin, qmax) - zero) * scale).astype(x.dtype), inside


def _forward(x: Array, scale: Any, zero: Any, qmin: Any, qmax: Any) -> tuple[Array, Array]:
  return _quantize(x, scale, zero, qmin, qmax)


def _backward(inside: Array, cotangent: Array) -> tuple[Array, None, None, None, None]:
  return jnp.where(inside, cotangent, jnp.zeros_like(cotangent)), None, None, None, None


fake_quant.defvjp(_forward, _backward)
