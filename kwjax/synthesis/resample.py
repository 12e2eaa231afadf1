"""Bilinear resampling of images along their rows and columns, linear in the pixels.

y[v,i,k] = sum_jw max(0, 1 - |r[v,i] - j|) max(0, 1 - |s[v,k] - w|) x[v,j,w], with r and s the positions that the rows and columns
of the result sample. This is a product with matrices of weights, because the gradient of a gather is a scatter, which is an
order of magnitude slower on CPUs and TPUs. On large images almost all weights are zero. There, CPUs compute a block of
neighbouring rows from the few rows that it samples, and a block of the gradient from the few rows that sample it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from kwjax.kernels.processor import computed_once

_BLOCK = 32  # rows computed at once
_LARGE = 128  # rows and columns; below, gathering blocks costs more than it saves


def outside(size: int) -> float:
  """A position outside an image of `size` rows; it samples zeros."""
  return 4.0 * size


def resample(images: Array, rows: Array, columns: Array, magnification: float) -> Array:
  """One view of every image. On large images only reverse-mode differentiation works.

  Args:
    images: f32[v,h,w,c].
    rows: f32[v,h], the image row that each row of the view samples, ascending or descending by at most one row;
      `outside(h)` is a row of zeros, before or after the others.
    columns: f32[v,w], the same for columns.
    magnification: largest number of view rows for one image row, >= 1.

  Returns: f32[v,h,w,c].
  """
  # Only a small part of the view may sample a block: at 1/12 of the area and 224 pixels, blocks are slower.
  if min(images.shape[1:3]) < max(_LARGE, 2 * (_BLOCK + 2) * magnification):
    return _products(images, rows, columns)
  return _large(images.astype(jnp.result_type(images, rows, columns)), rows, columns, magnification)


def _products(images: Array, rows: Array, columns: Array) -> Array:
  highest = lax.Precision.HIGHEST  # the default of TPUs would round the pixels to bfloat16
  moved = jnp.einsum("vij,vjwc->viwc", _weights(rows, images.shape[1]), images, precision=highest)
  return jnp.einsum("vkw,viwc->vikc", _weights(columns, images.shape[2]), moved, precision=highest)


def _weights(positions: Array, size: int) -> Array:
  """Matrices f32[v,n,size]: the weight of each row at each position."""
  return jnp.maximum(0.0, 1.0 - jnp.abs(positions[..., None] - jnp.arange(size, dtype=jnp.float32)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _large(images: Array, rows: Array, columns: Array, magnification: float) -> Array:
  del magnification
  return lax.platform_dependent(
    images, rows, columns, cpu=lambda x, r, s: _in_blocks(x, r, s, _looks_at), default=_products
  )


def _large_forward(
  images: Array, rows: Array, columns: Array, magnification: float
) -> tuple[Array, tuple[Array, Array]]:
  return _large(images, rows, columns, magnification), (rows, columns)


def _large_backward(
  magnification: float, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array, Array]:
  rows, columns = residuals
  seen_by = functools.partial(_seen_by, most=math.ceil((_BLOCK + 1) * magnification) + 1)
  gradient = lax.platform_dependent(
    cotangent,
    rows,
    columns,
    # Blocks overlap; without the barrier, the cotangent would be computed again for each.
    cpu=lambda g, r, s: _in_blocks(computed_once(g), r, s, seen_by),
    # The map is linear and keeps the shape, so the cotangent can replace the images.
    default=lambda g, r, s: jax.linear_transpose(lambda x: _products(x, r, s), g)(g)[0],
  )
  return gradient, jnp.zeros_like(rows), jnp.zeros_like(columns)


_large.defvjp(_large_forward, _large_backward)


def _in_blocks(images: Array, rows: Array, columns: Array, find: Callable[[Array], tuple[Array, Array]]) -> Array:
  """Resample rows, then columns as rows of the transposed images, in the blocks of `find`."""
  return _blocks_of_rows(_blocks_of_rows(images, *find(rows)).swapaxes(1, 2), *find(columns)).swapaxes(1, 2)


def _blocks_of_rows(images: Array, first: Array, weights: Array) -> Array:
  """Each block of 32 rows as sums of neighbouring rows.

  Args:
    images: f32[v,h,w,c].
    first: i32[v,blocks], the first row in the sum of a block.
    weights: f32[v,blocks,32,r], the weights of that row and the next ones for each row of a block.

  Returns: f32[v,h,w,c].
  """
  lines = images.reshape(*images.shape[:2], -1)
  count = weights.shape[3]
  windows = jax.vmap(lambda x, starts: jax.vmap(lambda start: lax.dynamic_slice_in_dim(x, start, count))(starts))
  blocks = lax.dot_general(
    weights, windows(lines, first), (((3,), (2,)), ((0, 1), (0, 1))), precision=lax.Precision.HIGHEST
  )
  return blocks.reshape(lines.shape[0], -1, lines.shape[2])[:, : lines.shape[1]].reshape(images.shape)


def _looks_at(positions: Array) -> tuple[Array, Array]:
  """The first image row that each block of view rows samples, and the weights (see `_blocks_of_rows`)."""
  size = positions.shape[1]
  missing = -size % _BLOCK
  padded = jnp.pad(positions, ((0, 0), (0, missing)), constant_values=outside(size))
  blocks = padded.reshape(positions.shape[0], -1, _BLOCK)
  first = jnp.clip(jnp.floor(blocks.min(2)), 0, size - _BLOCK - 2).astype(jnp.int32)
  return first, _weights(blocks - first[..., None], _BLOCK + 2)


def _seen_by(positions: Array, most: int) -> tuple[Array, Array]:
  """The first view row that samples each block of image rows, and the weights (see `_blocks_of_rows`).

  Args:
    positions: f32[v,n].
    most: largest number of view rows that sample one block.
  """
  size = positions.shape[1]
  most = min(most, size)
  start = _BLOCK * jnp.arange(-(-size // _BLOCK), dtype=jnp.float32)
  looking = (positions[:, None] > start[:, None] - 1) & (positions[:, None] < start[:, None] + _BLOCK)
  first = jnp.clip(jnp.argmax(looking, 2), 0, size - most)
  there = jax.vmap(lambda p, starts: jax.vmap(lambda s: lax.dynamic_slice_in_dim(p, s, most))(starts))(positions, first)
  return first, _weights(there - start[:, None], _BLOCK).swapaxes(2, 3)
