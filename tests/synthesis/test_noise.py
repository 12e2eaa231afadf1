"""Noise against its own definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.errors import KwjaxError
from kwjax.synthesis import dead_leaves, fresh_dead_leaves, fresh_gaussian, gaussian_images

MEAN, STD = (0.2, 0.5, 0.7), (0.1, 0.2, 0.3)


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


def test_drawn_anew_they_are_the_ones_of_the_key() -> None:
  key, place = jax.random.key(3), jnp.zeros((2, 8, 8, 3))
  gaussian, leaves = fresh_gaussian(MEAN, STD), fresh_dead_leaves(shapes="circle", radii=(0.1, 0.9))
  np.testing.assert_array_equal(gaussian(key, place), gaussian_images(key, 2, (8, 8, 3), MEAN, STD))
  expected = dead_leaves(key, 2, (8, 8, 3), shapes="circle", radii=(0.1, 0.9))
  np.testing.assert_array_equal(leaves(key, place), expected)
  # As distillation calls them: an image at a time, each with its own key.
  keys = jax.random.split(key, 2)
  for draw in (gaussian, leaves):
    together = jax.vmap(lambda k, x, draw=draw: draw(k, x[None])[0])(keys, place)
    for i in range(2):
      np.testing.assert_allclose(together[i], draw(keys[i], place[:1])[0], atol=1e-6)


def test_equal_settings_are_equal_functions() -> None:
  assert fresh_dead_leaves() == fresh_dead_leaves(shapes="mixed")
  assert hash(fresh_gaussian(np.float32(MEAN), STD)) == hash(fresh_gaussian(list(np.float32(MEAN)), list(STD)))
  assert fresh_gaussian(MEAN, STD) != fresh_gaussian(MEAN, STD, clip=True)
  settings = fresh_dead_leaves(shapes=("circle", "square")).to_json()
  assert (settings["name"], list(settings["shapes"])) == ("fresh_dead_leaves", ["circle", "square"])
  with pytest.raises(KwjaxError, match="unknown shape of leaves 'star'"):
    fresh_dead_leaves(shapes="star")
  with pytest.raises(KwjaxError, match="a mean and a positive std a channel"):
    fresh_gaussian(MEAN, (0.1, 0.0, 0.1))
