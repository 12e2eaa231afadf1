"""Gaussian noise images. Dead leaves are in `dead_leaves_model.py`."""

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
  """Independent pixels N(mean, std^2). With the network's mean and std this is the scheme `gaussian`.

  It is then N(0, 1) in the network's normalized input space, not clipped. With another mean and std, such as 1/2 and 1/4,
  and `clip`, the images fit into a file and use no statistic of the training data.

  Args:
    key: PRNG key.
    count: number of images n.
    image_shape: (h, w, c).
    mean: for each channel, in [0,1] pixel units.
    std: for each channel, the same units.
    clip: clip to [0,1]; this makes variances smaller.

  Returns:
    f32[n,h,w,c]. Without `clip` and with usual statistics, about one value in twenty is outside [0,1].

  Source: Haroush et al. (2020), section 4; Raikwar & Mishra (2022).
  """
  noise = jax.random.normal(key, (count, *image_shape), jnp.float32)
  images = jnp.asarray(mean, jnp.float32) + jnp.asarray(std, jnp.float32) * noise
  return jnp.clip(images, 0.0, 1.0) if clip else images
