"""A larger set out of few images: views of each, drawn as the synthesis draws them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from kwjax.synthesis.augment import Augmentation, augment

Array = jax.Array
_AT_A_TIME = 8


def enlarge(images: Array | np.ndarray, views: int, augmentation: Augmentation, *, key: Array) -> np.ndarray:
  """The images and `views` - 1 random views of each; f32[n * views,h,w,c] in [0,1], those of an image are neighbours.

  Images that were synthesized under an augmentation have the statistics of the training data in their views too, and views cost
  next to nothing. Whether a calibration gains by them depends on the network: EfficientNet-Lite0 does, MobileNetV2 loses.

  Args:
    images: f32[n,h,w,c] in [0,1].
    views: number of each; 1 returns the images.
    augmentation: what is drawn.
    key: PRNG key; an image's views do not depend on how many images there are.
  """
  images = np.asarray(images, np.float32)
  if views == 1:
    return images
  augmentation = dataclasses.replace(augmentation, keep_first=True)
  made = np.empty((len(images) * views, *images.shape[1:]), np.float32)
  for start in range(0, len(images), _AT_A_TIME):
    part = images[start : start + _AT_A_TIME]
    # Always as many, so that one program serves all.
    full = np.concatenate([part, np.zeros((_AT_A_TIME - len(part), *part.shape[1:]), np.float32)])
    drawn = _views(full, jax.random.fold_in(key, start), augmentation, views)
    made[start * views : (start + len(part)) * views] = np.asarray(drawn)[: len(part) * views]
  return np.clip(made, 0.0, 1.0)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _views(images: Array, key: Array, augmentation: Augmentation, views: int) -> Array:
  return augment(images, key, augmentation, duplicates=views)
