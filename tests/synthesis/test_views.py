"""Sets that are enlarged by views of their images."""

from __future__ import annotations

import jax
import numpy as np

from kwjax.synthesis import Augmentation, enlarge

KEY = jax.random.key(3)


def test_each_image_comes_first_and_then_its_own_views() -> None:
  images = np.asarray(jax.random.uniform(jax.random.key(0), (11, 6, 6, 3)))
  found = enlarge(images, 3, Augmentation(flip=True), key=KEY)
  assert found.shape == (33, 6, 6, 3)
  np.testing.assert_array_equal(found[::3], images)
  mirrored = 0
  for i in (1, 2):
    for view, image in zip(found[i::3], images, strict=True):
      flipped = np.array_equal(view, image[:, ::-1])
      assert flipped or np.array_equal(view, image)
      mirrored += flipped
  assert 4 < mirrored < 18
  np.testing.assert_array_equal(enlarge(images[:9], 3, Augmentation(flip=True), key=KEY), found[:27])


def test_one_view_is_the_image_and_pixels_stay_in_range() -> None:
  images = np.asarray(jax.random.uniform(jax.random.key(0), (2, 9, 9, 3)))
  np.testing.assert_array_equal(enlarge(images, 1, Augmentation.training(9), key=KEY), images)
  crops = enlarge(images, 40, Augmentation(crop_resize=(0.2, 0.9)), key=KEY)
  assert crops.min() >= 0.0
  assert crops.max() <= 1.0
  assert len(np.unique(crops.reshape(80, -1), axis=0)) == 80
