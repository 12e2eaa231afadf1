"""Adversarial images, to see whether a score finds them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kwjax.errors import DataError, KwjaxError
from kwjax.network import Array, Network
from kwjax.runtime.data import checked_labels, pad_batch
from kwjax.runtime.evaluate import Devices
from kwjax.runtime.parallel import DeviceGroup, device_group

Space = Literal["normalized", "pixel"]


def fgsm(
  network: Network, images: Array, labels: Array, epsilon: float, *, space: Space = "normalized", clip: bool = False
) -> Array:
  r"""Fast gradient sign method: every image moved by one step that makes its own label less likely; pure.

  $x + \epsilon s\, \mathrm{sign}(\nabla_x CE(\mathrm{logits}(x), y))$; s is the network's `input_std` in "normalized" space,
  where the network sees a step of epsilon, and 1 in "pixel" space.

  Args:
    network: in evaluation mode, float or quantized.
    images: f32[b,h,w,c] in [0,1].
    labels: i32[b], below the number of logits.
    epsilon: size of the step. Haroush et al. (2020) have 0.1, which gives their J_KL in normalized space, without clipping.
    space: in whose units epsilon is.
    clip: bring the result back into [0,1]. Without it pixels may leave it by the step.

  Returns:
    f32[b,h,w,c].

  Raises:
    KwjaxError: the space is unknown.

  Source: Goodfellow et al. (2015), "Explaining and harnessing adversarial examples".
  """
  if space not in ("normalized", "pixel"):
    raise KwjaxError(f"the space of fgsm is 'normalized' or 'pixel', found {space!r}")

  def loss(x: Array) -> Array:
    # A sum: an image's gradient is then its own, whatever the batch.
    return optax.softmax_cross_entropy_with_integer_labels(network.apply(x), labels).sum()

  images = jnp.asarray(images, jnp.float32)
  step = epsilon * (jnp.asarray(_float(network).input_std, jnp.float32) if space == "normalized" else 1.0)
  moved = images + step * jnp.sign(jax.grad(loss)(images))
  return jnp.clip(moved, 0.0, 1.0) if clip else moved


def fgsm_images(
  network: Network,
  images: np.ndarray | Array,
  labels: np.ndarray | Array,
  epsilon: float,
  *,
  space: Space = "normalized",
  clip: bool = False,
  batch_size: int = 128,
  devices: Devices = None,
) -> np.ndarray:
  """`fgsm` of any number of images, in batches on one device or many; each process attacks all of them.

  Args:
    network: as in `fgsm`.
    images: f32[n,h,w,c] in [0,1].
    labels: i[n].
    epsilon: as in `fgsm`.
    space: as in `fgsm`.
    clip: as in `fgsm`.
    batch_size: images a step; the last batch is filled up.
    devices: number of devices of each process, devices, or None (all accelerators, or one CPU a process).

  Returns:
    f32[n,h,w,c].

  Raises:
    DataError: there are no images, or the labels do not fit.
    KwjaxError: as `fgsm`.
  """
  if not len(images) or batch_size < 1:
    raise DataError(f"expected at least one image and batch_size >= 1, got {len(images)} and {batch_size}")
  wanted = checked_labels(np.asarray(labels), len(images), _float(network).num_classes, "fgsm")
  group = device_group(devices).local
  size = group.padded(min(batch_size, len(images)))
  placed, attack = group.replicate(network), _compiled_attack(group, float(epsilon), space, clip)
  parts = []
  for first in range(0, len(images), size):
    rows = slice(first, first + size)
    pixels, classes, valid = pad_batch(
      np.asarray(images[rows], np.float32), None if wanted is None else wanted[rows], size
    )
    parts.append(group.unshard(attack(placed, *group.shard((pixels, classes))))[valid])
  return np.concatenate(parts)


@functools.lru_cache(maxsize=16)
def _compiled_attack(group: DeviceGroup, epsilon: float, space: Space, clip: bool) -> Callable[..., Array]:
  def attack(network: Network, images: Array, labels: Array, axis_name: str | None) -> Array:
    return fgsm(network, images, labels, epsilon, space=space, clip=clip)

  return group.compile(attack)


def _float(network: Network) -> Network:
  """The float network behind a quantized one."""
  return getattr(network, "network", network)
