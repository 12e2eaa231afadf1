"""Images that no network made: Gaussian noise; dead leaves are in their own file."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


def gaussian_images(
  key: Array,
  count: int,
  image_shape: tuple[int, int, int],
  mean: Sequence[float],
  std: Sequence[float],
  *,
  clip: bool = False,
) -> Array:
  """Independent pixels N(mean, std^2): the G scheme, N(0, 1) in the network's normalized input space.

  Normalized space: the mean and the std of the network's input, not clipped. Pixel space: any mean and std, such as 1/2 and
  1/4, clipped, which are images that a file can hold and need nothing that was measured on the training data.

  Args:
    key: PRNG key.
    count: number of images n.
    image_shape: (h, w, c).
    mean: per channel, in [0,1] pixel units.
    std: the same units.
    clip: clip to [0,1]; smaller variances are the consequence.

  Returns:
    f32[n,h,w,c]; with the statistics of usual data and without `clip` about one value in twenty lies outside [0,1].

  Source: Haroush et al. (2020), section 4; Raikwar & Mishra (2022).
  """
  noise = jax.random.normal(key, (count, *image_shape), jnp.float32)
  images = jnp.asarray(mean, jnp.float32) + jnp.asarray(std, jnp.float32) * noise
  return jnp.clip(images, 0.0, 1.0) if clip else images
