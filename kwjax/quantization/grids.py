"""Uniform grids of levels: the weight schemes, and the grid of activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kwjax.errors import RuleError

Array = jax.Array

_SMALLEST = float(jnp.finfo(jnp.float32).tiny)


class Grid(NamedTuple):
  """Arguments of `fake_quant`. Invariant: level k stands for (k - zero) * scale, scale > 0, qmin <= k <= qmax."""

  scale: Array
  zero: Array
  qmin: int
  qmax: int


class Spacing(NamedTuple):
  """Distance and zero point of the levels of each output channel, of a grid that does not follow the weights.

  Attributes:
    scale: s > 0, f32 of the kernel's rank with size 1 inside a channel.
    zero: the level of 0, as `scale`.
  """

  scale: Array
  zero: Array


class Clip(NamedTuple):
  """The shares of a channel's range that its grid clips at either end.

  Attributes:
    lo: share clipped below, in [0, 0.5), f32 of the shape of the grid's scale.
    hi: share clipped above, as `lo`.
  """

  lo: Array
  hi: Array


def _positive(scale: Array) -> Array:
  """The scale, or 1 for a channel of one value, whose extent is 0."""
  return jnp.where(scale > _SMALLEST, scale, 1.0)


def _sym(lo: Array, hi: Array, bits: int) -> Grid:
  top = 2 ** (bits - 1) - 1
  scale = _positive(jnp.maximum(-lo, hi) / top)
  return Grid(scale, jnp.zeros_like(scale), -top, top)


def _symfull(lo: Array, hi: Array, bits: int) -> Grid:
  top = 2 ** (bits - 1)
  scale = _positive(jnp.maximum(-lo, hi) / top)
  return Grid(scale, jnp.zeros_like(scale), -top, top - 1)


def _affine(lo: Array, hi: Array, bits: int) -> Grid:
  top = 2**bits - 1
  scale = _positive((hi - lo) / top)
  return Grid(scale, -lo / scale, 0, top)


def _affine0(lo: Array, hi: Array, bits: int) -> Grid:
  grid = _affine(jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0), bits)
  return grid._replace(zero=jnp.round(grid.zero))


def _midrise(lo: Array, hi: Array, bits: int) -> Grid:
  top = 2**bits - 1
  # No level is zero: a channel of zeros gets the smallest levels, with which nothing comes out of it.
  scale = 2.0 * jnp.maximum(jnp.maximum(-lo, hi) / top, 2.0 * _SMALLEST)
  return Grid(scale, jnp.full_like(scale, top / 2), 0, top)


WEIGHT_SCHEMES: dict[str, Callable[[Array, Array, int], Grid]] = {
  "affine": _affine,
  "affine0": _affine0,
  "sym": _sym,
  "symfull": _symfull,
  "midrise": _midrise,
}
"""`(lowest weight, highest weight, bits) -> Grid`, b bits each:

affine: 2^b levels from min to max, real zero point.
affine0: 2^b levels from min(min, 0) to max(max, 0), integer zero point.
sym: scale max|w| / (2^(b-1) - 1), levels symmetric around 0.
symfull: scale max|w| / 2^(b-1), levels -2^(b-1) to 2^(b-1) - 1.
midrise: 2^b levels from -max|w| to max|w| without one at zero.
"""


def weight_grid(weights: Array, scheme: str, bits: int, *, axes: tuple[int, ...], clip: Clip | None = None) -> Grid:
  """The grid of each output channel of a kernel, from its lowest and highest weight; it gets no gradient.

  Args:
    weights: kernel, any float type.
    scheme: a name in `WEIGHT_SCHEMES`.
    bits: 2 to 8.
    axes: axes to reduce, those inside one channel.
    clip: shares of the scheme's range that the grid clips; None: no clipping.

  Returns:
    A grid. Its scale (units of the weights) and zero have the kernel's rank, with size 1 along `axes`.

  Raises:
    RuleError: the scheme is unknown.
  """
  _check_scheme(scheme)
  weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
  lo, hi = jnp.min(weights, axes, keepdims=True), jnp.max(weights, axes, keepdims=True)
  if clip is not None:
    lo, hi = _extent(scheme, lo, hi)
    span = hi - lo
    lo, hi = lo + clip.lo * span, hi - clip.hi * span
  return WEIGHT_SCHEMES[scheme](lo, hi, bits)


def fixed_grid(spacing: Spacing, scheme: str, bits: int) -> Grid:
  """The grid of a scheme with given scales and zero points; it gets no gradient.

  Args:
    spacing: of each output channel.
    scheme: a name in `WEIGHT_SCHEMES`; it gives the lowest and the highest level.
    bits: 2 to 8.

  Raises:
    RuleError: the scheme is unknown.
  """
  _check_scheme(scheme)
  scale, zero = (jax.lax.stop_gradient(jnp.asarray(value, jnp.float32)) for value in spacing)
  return WEIGHT_SCHEMES[scheme](jnp.float32(-1.0), jnp.float32(1.0), bits)._replace(scale=scale, zero=zero)


def _check_scheme(scheme: str) -> None:
  if scheme not in WEIGHT_SCHEMES:
    raise RuleError(f"unknown weight scheme {scheme!r}, known are {', '.join(WEIGHT_SCHEMES)}")


def _extent(scheme: str, lo: Array, hi: Array) -> tuple[Array, Array]:
  """The range of a scheme's levels for a lowest and a highest weight."""
  if scheme == "affine":
    return lo, hi
  if scheme == "affine0":
    return jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)
  largest = jnp.maximum(-lo, hi)
  return -largest, largest


def activation_grid(lo: Array, hi: Array, bits: int) -> Grid:
  """2^b unsigned levels over the range extended to include 0. The zero point is an integer, so zero padding is exact.

  Args:
    lo: lowest activation, f32[].
    hi: highest activation, f32[].
    bits: 2 to 8.
  """
  lo, hi = (jax.lax.stop_gradient(jnp.asarray(v, jnp.float32)) for v in (lo, hi))
  return _affine0(lo, hi, bits)
