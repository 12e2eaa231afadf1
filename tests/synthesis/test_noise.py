"""Noise against its own definitions."""

import jax
import numpy as np

from kwjax.synthesis import gaussian_images


def test_gaussian_images_have_the_data_sets_moments() -> None:
  images = np.asarray(gaussian_images(jax.random.key(0), 64, (16, 16, 3), (0.2, 0.5, 0.7), (0.1, 0.2, 0.3)))
  np.testing.assert_allclose(images.mean((0, 1, 2)), [0.2, 0.5, 0.7], atol=0.01)
  np.testing.assert_allclose(images.std((0, 1, 2)), [0.1, 0.2, 0.3], rtol=0.02)


def test_clipped_ones_are_the_same_images_within_the_range() -> None:
  plain, clipped = (
    np.asarray(gaussian_images(jax.random.key(0), 64, (16, 16, 3), (0.5,) * 3, (0.25,) * 3, clip=clip))
    for clip in (False, True)
  )
  np.testing.assert_array_equal(clipped, np.clip(plain, 0.0, 1.0))
  # Two standard deviations on either side: 4.55 % of a Gaussian.
  np.testing.assert_allclose(np.mean((clipped == 0.0) | (clipped == 1.0)), 0.0455, atol=0.004)
