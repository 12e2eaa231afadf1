"""The dead leaves image model: flat-coloured shapes that hide one another, drawn front to back."""

from __future__ import annotations

import concurrent.futures
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kwjax.errors import KwjaxError

Array = jax.Array

LEAF_SHAPES = ("circle", "square", "oriented_square", "rectangle", "triangle", "quadrilateral")
MIXED = "mixed"
RADII = (0.03, 1.0)
"""Smallest and largest radius of a leaf, as a share of the longer side of the image."""

MAX_LEAVES = 5000
CHUNK = 32  # leaves drawn and tested at a time
_WORDS = 9  # random numbers for each leaf: radius, centre, kind, turn, corners
_FEW = 32  # pixels; below, gathering the uncovered ones costs more than it saves
_PARTS = (1, 2, 8)  # share of the pixels that a pass tests; each pass is compiled
_NONE = -1
_TOGETHER = 64  # images at a time: they stay in the cache, and few wait for the slowest


@functools.cache
def radius_table(smallest: float, largest: float) -> np.ndarray:
  """Quantiles of the radii at equal steps, for the density r^-3 - largest^-3."""
  radii = np.linspace(smallest, largest, 20_000)
  cumulative = np.cumsum(radii**-3.0 - largest**-3.0)
  return np.interp(np.linspace(0.0, 1.0, 4096), cumulative / cumulative[-1], radii).astype(np.float32)


def dead_leaves(
  key: Array,
  count: int,
  image_shape: tuple[int, int, int],
  *,
  shapes: str | Sequence[str] = MIXED,
  radii: tuple[float, float] = RADII,
  max_leaves: int = MAX_LEAVES,
  devices: Sequence[jax.Device] = (),
) -> Array:
  """Dead leaves: overlapping flat-coloured shapes. Their radii follow a power law, as objects in natural images do.

  Leaves are drawn front to back, and a pixel keeps the first leaf that covers it. This equals painting back to front. The
  radius density is r^-3 - r_max^-3 between the bounds. Centres are uniform in the image, colours in [0,1]^c, and shapes
  over those that are named. The key determines the images.

  Args:
    key: PRNG key.
    count: number of images n.
    image_shape: (h, w, c), any size and number of channels.
    shapes: "mixed", or one or several of circle, square, oriented_square, rectangle, triangle, quadrilateral.
    radii: smallest and largest radius as shares of the longer side; no leaf is smaller than one pixel.
    max_leaves: a pixel that none of them covers stays black.
    devices: each draws a part of the images at the same time; empty: JAX's default device. An image depends only on the
      key and its index.

  Returns:
    f32[n,h,w,c] in [0,1], on the first device.

  Raises:
    KwjaxError: a shape is unknown, or the bounds are not 0 < smallest < largest.

  Source: Baradad et al. (2021), "Learning to See by Looking at Noise"; Lee, Mumford & Huang (2001).
  """
  kinds, bounds = shape_indices(shapes), checked_radii(radii)
  places: Sequence[Any] = devices or (None,)
  each = -(-count // len(places))
  # A power of two, so that few sizes are compiled.
  together = min(_TOGETHER, 1 << max(each - 1, 0).bit_length())
  lay = functools.partial(
    lay_leaves, count=together, image_shape=tuple(image_shape), kinds=kinds, radii=bounds, max_leaves=max_leaves
  )

  def share(index: int) -> Array:
    first, last = index * each, min((index + 1) * each, count)
    placed = jax.device_put(key, places[index])
    parts = [lay(placed, jnp.int32(start)) for start in range(first, max(last, first + 1), together)]
    return jnp.concatenate(parts)[: max(last - first, 0)]

  # One thread each: a CPU device runs a loop of unknown length in the calling thread.
  with concurrent.futures.ThreadPoolExecutor(len(places)) as threads:
    shares = list(threads.map(share, range(len(places))))
  return jnp.concatenate([jax.device_put(part, places[0]) for part in shares])


def checked_radii(radii: tuple[float, float]) -> tuple[float, float]:
  """Smallest and largest radius as floats. Raises KwjaxError unless 0 < smallest < largest."""
  smallest, largest = map(float, radii)
  if not 0.0 < smallest < largest < float("inf"):
    raise KwjaxError(f"radii of dead leaves need 0 < smallest < largest, found {smallest:g} and {largest:g}")
  return smallest, largest


def shape_indices(shapes: str | Sequence[str]) -> tuple[int, ...]:
  """Indices of shapes in `LEAF_SHAPES`. Raises KwjaxError for an unknown shape."""
  names = LEAF_SHAPES if shapes == MIXED else (shapes,) if isinstance(shapes, str) else tuple(shapes)
  unknown = [name for name in names if name not in LEAF_SHAPES]
  if unknown or not names:
    raise KwjaxError(
      f"unknown shape of leaves {unknown[0] if unknown else ''!r}; known: {MIXED}, {', '.join(LEAF_SHAPES)}"
    )
  return tuple(LEAF_SHAPES.index(name) for name in names)


_Carry = tuple[Array, Array, list[list[Array]]]


@functools.partial(jax.jit, static_argnames=("count", "image_shape", "kinds", "radii", "max_leaves"))
def lay_leaves(
  key: Array,
  first: Array,
  count: int,
  image_shape: tuple[int, int, int],
  kinds: tuple[int, ...],
  radii: tuple[float, float],
  max_leaves: int,
) -> Array:
  """Images `first` to `first + count`: for each pixel the number of the first leaf that covers it, then its colour.

  Covered pixels need no further tests, and most are covered soon. When at most a half, and then an eighth, of the pixels
  of every image are uncovered, these are gathered and only they are tested.

  Args:
    key: PRNG key of all images; image i depends only on it and i.
    first: i32[], index of the first image.
    count: number of images n.
    image_shape: (h, w, c).
    kinds: of `shape_indices`.
    radii: of `checked_radii`.
    max_leaves: as in `dead_leaves`.

  Returns:
    f32[n,h,w,c] in [0,1].
  """
  height, width, channels = image_shape
  pixels = height * width
  shape_keys, colour_keys = (
    jax.vmap(jax.random.fold_in, (None, 0))(part, first + jnp.arange(count)) for part in jax.random.split(key)
  )

  def leaves(number: Array) -> list[list[Array]]:
    bits = jax.vmap(lambda k: jax.random.bits(jax.random.fold_in(k, number), (_WORDS, CHUNK)))(shape_keys)
    return _edges(bits, height, width, kinds, radii)

  def step(carry: _Carry, where: Array) -> _Carry:
    number, winner, edges = carry
    hit = _first_hit(edges, *_coordinates(where, height, width))
    found = (winner == _NONE) & (hit < CHUNK) & (number + hit < max_leaves)
    # The next leaves are drawn one step ahead: XLA:CPU would fuse drawing and testing, and draw again for every pixel.
    return number + CHUNK, jnp.where(found, number + hit, winner), leaves(number + CHUNK)

  number, edges = jnp.int32(0), leaves(jnp.int32(0))
  where = jnp.broadcast_to(jnp.arange(pixels), (count, pixels))
  winners = jnp.full((count, pixels), _NONE, jnp.int32)
  local = winners
  sizes = [-(-pixels // part) for part in _PARTS if part == 1 or pixels > _FEW * part]
  for size, smaller in zip(sizes, [*sizes[1:], 0]):

    def unfinished(carry: _Carry, smaller: int = smaller) -> Array:
      return (carry[0] < max_leaves) & jnp.any(jnp.sum(carry[1] == _NONE, axis=1) > smaller)

    carry = (number, local, edges)
    number, local, edges = lax.while_loop(unfinished, functools.partial(step, where=where), carry)
    winners = local if size == pixels else winners.at[jnp.arange(count)[:, None], where].set(local, mode="drop")
    if smaller:
      left = jax.vmap(lambda w, s=smaller: jnp.nonzero(w == _NONE, size=s, fill_value=w.shape[0])[0])(local)
      # Padding of the lists is outside of the image and counts as covered.
      where = jax.vmap(lambda p, i: p.at[i].get(mode="fill", fill_value=pixels))(where, left)
      local = jnp.where(where < pixels, _NONE, 0)

  def colour(key: Array, leaf: Array) -> Array:
    return to_unit_interval(jax.random.bits(jax.random.fold_in(key, leaf), (channels,)))

  colours = jax.vmap(jax.vmap(colour, (None, 0)))(colour_keys, jnp.maximum(winners, 0))
  return jnp.where(winners[..., None] == _NONE, 0.0, colours).reshape(count, height, width, channels)


def _coordinates(where: Array, height: int, width: int) -> tuple[Array, Array]:
  """Rows and columns of pixels from the middle of the image, where float32 resolves edges best."""
  return (where // width).astype(jnp.float32) - height / 2, (where % width).astype(jnp.float32) - width / 2


def _first_hit(edges: list[list[Array]], y: Array, x: Array) -> Array:
  """Index of the first of l leaves that covers each pixel (y, x) f32[b,p], else l; i32[b,p].

  Args:
    edges: four inequalities q (y^2 + x^2) + a y + b x + c >= 0 for each leaf, as lists of q, a, b, c f32[b,l].
    y: rows from the middle of the image.
    x: columns from the middle of the image.
  """
  square = y * y + x * x

  def left(values: list[Array]) -> Array:
    # Leaves run along the last axis: a minimum over it is vectorized.
    q, a, b, c = (value[:, None, :] for value in values)
    return q * square[..., None] + a * y[..., None] + b * x[..., None] + c

  inside = functools.reduce(jnp.minimum, map(left, edges)) >= 0.0
  count = inside.shape[-1]
  return jnp.min(jnp.where(inside, jnp.arange(count, dtype=jnp.int32), count), axis=-1)


def _edges(
  bits: Array, height: int, width: int, kinds: tuple[int, ...], radii: tuple[float, float]
) -> list[list[Array]]:
  """Leaves as inequalities of `_first_hit`; only the first of the four has a q, for discs.

  Args:
    bits: u32[b,9,l], random bits of l leaves for b images.
    height: of the image, in pixels.
    width: the same.
    kinds: indices into `LEAF_SHAPES` to choose from.
    radii: smallest and largest, as shares of the longer side.
  """
  draw = [to_unit_interval(bits[:, word]) for word in range(_WORDS)]
  table = jnp.asarray(radius_table(*radii))
  radius = jnp.maximum(table[(draw[0] * table.shape[0]).astype(jnp.int32)] * max(height, width), 1.0)
  centre_y, centre_x = (draw[1] - 0.5) * height, (draw[2] - 0.5) * width
  kind = jnp.asarray(kinds)[(draw[3] * len(kinds)).astype(jnp.int32)]
  directions = [_direction(turns) for turns in _corners(kind, draw[4], draw[5:])]
  corners = [(centre_y + radius * sine, centre_x + radius * cosine) for sine, cosine in directions]
  is_disc, nothing = kind == 0, jnp.zeros_like(radius)
  edges: list[list[Array]] = []
  for (y0, x0), (y1, x1) in zip(corners, corners[1:] + corners[:1]):
    edge_y, edge_x = y1 - y0, x1 - x0
    line = (nothing, edge_x, -edge_y, edge_y * x0 - edge_x * y0)
    # A disc is one inequality; the other three are 0 >= 0.
    disc = (nothing,) * 4
    if not edges:
      disc = (nothing - 1.0, 2 * centre_y, 2 * centre_x, radius**2 - centre_y**2 - centre_x**2)
    edges.append([jnp.where(is_disc, of_disc, of_line) for of_disc, of_line in zip(disc, line)])
  return edges


def to_unit_interval(bits: Array) -> Array:
  """u32 -> f32 in [0, 1), multiples of 2^-24."""
  return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _corners(kind: Array, turn: Array, free: Sequence[Array]) -> list[Array]:
  """Angles of the four corners of polygons on their circles, ascending, in turns, from uniform numbers in [0, 1)."""
  half = turn / 4
  rectangle = (half, 0.5 - half, 0.5 + half, 1.0 - half)
  # A triangle has its first corner twice: an edge of length zero excludes nothing.
  first, second, third, fourth = free
  triangle, quadrilateral = _sorted(first, second, third, first), _sorted(first, second, third, fourth)
  found = []
  for i in range(4):
    place = jnp.full_like(turn, (2 * i + 1) / 8)
    for index, other in ((2, place + turn), (3, rectangle[i]), (4, triangle[i]), (5, quadrilateral[i])):
      place = jnp.where(kind == index, other, place)
    found.append(place)
  return found


def _direction(turns: Array) -> tuple[Array, Array]:
  """Sine and cosine of an angle in turns, to 2e-5, by Taylor series; XLA:CPU's own functions are slower."""
  t = turns - jnp.round(turns)
  square = t * t
  sine, cosine = jnp.zeros_like(t), jnp.zeros_like(t)
  for k in reversed(range(8)):
    sign, angle = (-1.0) ** k, 2.0 * math.pi
    cosine = cosine * square + sign * angle ** (2 * k) / math.factorial(2 * k)
    sine = sine * square + sign * angle ** (2 * k + 1) / math.factorial(2 * k + 1)
  return sine * t, cosine


def _sorted(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array, Array, Array]:
  """Sorted ascending by comparisons: a general sort is a loop with a call for each pair on a CPU."""
  a, b, c, d = jnp.minimum(a, b), jnp.maximum(a, b), jnp.minimum(c, d), jnp.maximum(c, d)
  low, high, middle, other = jnp.minimum(a, c), jnp.maximum(b, d), jnp.maximum(a, c), jnp.minimum(b, d)
  return low, jnp.minimum(middle, other), jnp.maximum(middle, other), high
