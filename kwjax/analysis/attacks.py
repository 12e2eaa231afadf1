"""Adversarial images, to see whether a score finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kwjax.errors import DataError, KwjaxError
from kwjax.network import Array, Network
from kwjax.runtime.data.images import checked_labels
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.forwarding import forward_rows
from kwjax.runtime.devices.parallel import Devices

Space = Literal["normalized", "pixel"]


def fgsm(
  network: Network, images: Array, labels: Array, epsilon: float, *, space: Space = "normalized", clip: bool = False
) -> Array:
  r"""Fast gradient sign method: moves every image by one step that makes its own label less likely; pure.

  $x + \epsilon s\, \mathrm{sign}(\nabla_x CE(\mathrm{logits}(x), y))$. In "normalized" space s is the network's `input_std`, so
  that the network sees a step of epsilon. In "pixel" space s is 1.

  Args:
    network: in evaluation mode, float or quantized.
    images: f32[b,h,w,c] in [0,1].
    labels: i32[b], below the number of logits.
    epsilon: size of the step. Haroush et al. (2020) have 0.1, which gives their J_KL in normalized space, without clipping.
    space: in whose units epsilon is.
    clip: bring the result back into [0,1], which pixels may leave by the step otherwise.

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
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> np.ndarray:
  """`fgsm` of any number of images, in batches, on one device or many.

  Of several processes each attacks its share of the images, and all get all of them.

  Args:
    network: as in `fgsm`.
    images: f32[n,h,w,c] in [0,1].
    labels: i[n].
    epsilon: as in `fgsm`.
    space: as in `fgsm`.
    clip: as in `fgsm`.
    batch_size: most images attacked at a time. The last batch is padded.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    f32[n,h,w,c].

  Raises:
    DataError: there are no images, or the labels do not fit.
    KwjaxError: as `fgsm`.
    Interrupted: `should_stop` returned True, in any process.
  """
  if not len(images):
    raise DataError("expected at least one image, found none")
  wanted = checked_labels(np.asarray(labels), len(images), _float(network).num_classes, "fgsm")
  assert wanted is not None
  rows = forward_rows(
    _attacked,
    network,
    images,
    wanted,
    batch_size=batch_size,
    description="attack",
    devices=devices,
    progress=progress,
    should_stop=should_stop,
    options={"epsilon": float(epsilon), "space": space, "clip": clip},
  )
  return processes.gather(np.concatenate(list(rows)))


def _attacked(network: Network, images: Array, labels: Array, epsilon: float, space: Space, clip: bool) -> Array:
  return fgsm(network, images, labels, epsilon, space=space, clip=clip)


def _float(network: Network) -> Network:
  """The float network behind a quantized one."""
  return getattr(network, "network", network)
