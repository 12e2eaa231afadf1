"""Images that no network made: Gaussian noise and dead leaves."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

_SHAPES = 6  # circle, square, oriented square, rectangle, triangle, quadrilateral
_MAX_LEAVES = 5000
_MIN_RADIUS = 0.03


def gaussian_images(
  key: Array, count: int, image_shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]
) -> Array:
  """Independent pixels N(mean, std^2): the G scheme, N(0, 1) in the network's normalized input space; not clipped.

  Args:
    key: PRNG key.
    count: number of images n.
    image_shape: (h, w, c).
    mean: per channel, in [0,1] pixel units.
    std: the same units.

  Returns:
    f32[n,h,w,c]; about one value in twenty lies outside [0,1], and clipping would change the variance.

  Source: Haroush et al. (2020), section 4; Raikwar & Mishra (2022).
  """
  noise = jax.random.normal(key, (count, *image_shape), jnp.float32)
  return jnp.asarray(mean, jnp.float32) + jnp.asarray(std, jnp.float32) * noise


@functools.cache
def _radius_table() -> np.ndarray:
  """Radii at equal steps of the cumulative distribution of density r^-3 - 1 on [0.03, 1]."""
  radii = np.linspace(_MIN_RADIUS, 1.0, 20_000)
  cumulative = np.cumsum(radii**-3.0 - 1.0)
  return np.interp(np.linspace(0.0, 1.0, 4096), cumulative / cumulative[-1], radii).astype(np.float32)


def dead_leaves(
  key: Array,
  count: int,
  image_shape: tuple[int, int, int],
  *,
  max_leaves: int = _MAX_LEAVES,
  devices: Sequence[jax.Device] = (),
) -> Array:
  """Dead leaves of mixed shapes: overlapping flat-coloured shapes whose radii follow a power law, as natural images do.

  Leaves are laid front to back and a pixel keeps the first that covers it: the same process as painting back to front,
  exactly stationary, and reproducible from the key. Radius density r^-3 - 1 on [0.03, 1] of the image size, centres
  uniform, colours uniform in [0,1]^c, shapes uniform over circle, square, oriented square, rectangle, triangle and
  quadrilateral.

  Args:
    key: PRNG key.
    count: number of images n.
    image_shape: (h, w, c).
    max_leaves: a pixel that none of them covers stays black.
    devices: those that lay the leaves of a part of the images each, at the same time; empty: JAX's default one. An image
      depends on the key and its index alone.

  Returns:
    f32[n,h,w,c] in [0,1], on the first of the devices.

  Source: Baradad et al. (2021), "Learning to See by Looking at Noise"; Lee, Mumford & Huang (2001).
  """
  places = devices or (None,)
  each = -(-count // len(places))
  parts = [
    _dead_leaves(jax.device_put(key, place), i * each, min(each, count - i * each), tuple(image_shape), max_leaves)
    for i, place in enumerate(places)
    if i * each < count or i == 0
  ]
  return jnp.concatenate([jax.device_put(part, places[0]) for part in parts])


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _dead_leaves(key: Array, first: int, count: int, image_shape: tuple[int, int, int], max_leaves: int) -> Array:
  height, width, channels = image_shape
  size = max(height, width)
  table = jnp.asarray(_radius_table())
  rows, columns = jnp.arange(height, dtype=jnp.float32)[:, None], jnp.arange(width, dtype=jnp.float32)[None, :]

  def leaf(key: Array) -> tuple[Array, Array]:
    keys = jax.random.split(key, 6)
    radius = jnp.maximum(table[jax.random.randint(keys[0], (), 0, table.shape[0])] * size, 1.0)
    centre = jax.random.uniform(keys[1], (2,)) * jnp.array([height, width])
    kind = jax.random.randint(keys[2], (), 0, _SHAPES)
    y, x = rows - centre[0], columns - centre[1]
    inside = jnp.where(kind == 0, y**2 + x**2 <= radius**2, _inside_polygon(y, x, radius, kind, keys[3], keys[4]))
    return inside, jax.random.uniform(keys[5], (channels,))

  def lay(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    number, covered, canvas = carry
    indices = (first + jnp.arange(count)) * max_leaves + number
    inside, colour = jax.vmap(lambda i: leaf(jax.random.fold_in(key, i)))(indices)
    new = (inside & ~covered)[..., None]
    return number + 1, covered | inside, jnp.where(new, colour[:, None, None, :], canvas)

  def unfinished(carry: tuple[Array, Array, Array]) -> Array:
    return (carry[0] < max_leaves) & ~jnp.all(carry[1])

  start = (jnp.int32(0), jnp.zeros((count, height, width), bool), jnp.zeros((count, *image_shape), jnp.float32))
  return lax.while_loop(unfinished, lay, start)[2]


def _inside_polygon(y: Array, x: Array, radius: Array, kind: Array, angle_key: Array, corner_key: Array) -> Array:
  """Whether points lie in the polygon of this kind, with corners on a circle of the radius, in angular order."""
  quarter = jnp.pi / 2
  turn = jax.random.uniform(angle_key) * 2 * jnp.pi
  square = jnp.pi / 4 + quarter * jnp.arange(4)
  half = jax.random.uniform(angle_key, (), maxval=quarter)
  rectangle = jnp.array([half, jnp.pi - half, jnp.pi + half, 2 * jnp.pi - half])
  corners = jax.random.uniform(corner_key, (4,), maxval=2 * jnp.pi)
  # The first corner stands twice in a triangle: an edge of length zero excludes nothing.
  triangle = jnp.sort(corners.at[3].set(corners[0]))
  angles = jnp.stack([square, square, square + turn, rectangle, triangle, jnp.sort(corners)])[kind]
  corner_y, corner_x = radius * jnp.sin(angles), radius * jnp.cos(angles)
  edge_y, edge_x = jnp.roll(corner_y, -1) - corner_y, jnp.roll(corner_x, -1) - corner_x
  cross = edge_x[:, None, None] * (y - corner_y[:, None, None]) - edge_y[:, None, None] * (x - corner_x[:, None, None])
  return jnp.all(cross >= 0, axis=0)
