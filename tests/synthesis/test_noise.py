"""Noise against its own definitions."""

import jax
import numpy as np

from kwjax.synthesis import gaussian_images


def test_gaussian_images_have_the_data_sets_moments() -> None:
  images = np.asarray(gaussian_images(jax.random.key(0), 64, (16, 16, 3), (0.2, 0.5, 0.7), (0.1, 0.2, 0.3)))
  np.testing.assert_allclose(images.mean((0, 1, 2)), [0.2, 0.5, 0.7], atol=0.01)
  np.testing.assert_allclose(images.std((0, 1, 2)), [0.1, 0.2, 0.3], rtol=0.02)
