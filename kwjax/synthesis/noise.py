"""Images that no network made: Gaussian noise; dead leaves are in their own file."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


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
