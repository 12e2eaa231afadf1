"""Noise against its own definitions."""

import jax
import numpy as np

from kwjax.synthesis import dead_leaves, gaussian_images
from kwjax.synthesis.noise import _radius_table


def test_gaussian_images_have_the_data_sets_moments() -> None:
  images = np.asarray(gaussian_images(jax.random.key(0), 64, (16, 16, 3), (0.2, 0.5, 0.7), (0.1, 0.2, 0.3)))
  np.testing.assert_allclose(images.mean((0, 1, 2)), [0.2, 0.5, 0.7], atol=0.01)
  np.testing.assert_allclose(images.std((0, 1, 2)), [0.1, 0.2, 0.3], rtol=0.02)


def test_radii_follow_the_power_law() -> None:
  radii = _radius_table()
  fine = np.linspace(0.03, 1.0, 100_000)
  density = fine**-3 - 1
  for low, high in ((0.03, 0.05), (0.05, 0.1), (0.1, 1.0)):
    expected = density[(fine >= low) & (fine < high)].sum() / density.sum()
    assert abs(((radii >= low) & (radii < high)).mean() - expected) < 0.03


def test_dead_leaves_are_flat_coloured_covered_and_reproducible() -> None:
  images = np.asarray(dead_leaves(jax.random.key(0), 6, (24, 24, 3)))
  assert images.shape == (6, 24, 24, 3)
  assert images.min() >= 0 and images.max() <= 1
  assert not (images == 0).all(-1).any()  # no pixel is left uncovered
  # Flat leaves: neighbours are often exactly equal, which no smooth or noisy image is.
  assert 0.2 < (images[:, :, 1:] == images[:, :, :-1]).all(-1).mean() < 0.95
  np.testing.assert_array_equal(images, dead_leaves(jax.random.key(0), 6, (24, 24, 3)))
  assert not np.array_equal(images[0], images[1])
  np.testing.assert_allclose(images.mean(), 0.5, atol=0.1)  # colours are uniform


def test_dead_leaves_do_not_depend_on_the_devices_that_lay_them() -> None:
  for count in (1, 3, 5):
    alone = dead_leaves(jax.random.key(0), count, (12, 8, 3))
    together = dead_leaves(jax.random.key(0), count, (12, 8, 3), devices=jax.devices()[:2])
    np.testing.assert_array_equal(alone, together)


def test_too_few_leaves_leave_black() -> None:
  assert (np.asarray(dead_leaves(jax.random.key(0), 4, (24, 24, 3), max_leaves=1)) == 0).all(-1).any()
