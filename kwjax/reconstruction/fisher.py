"""How much each channel of a unit's output matters to the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.network import Array, Network
from kwjax.reconstruction.units import Part
from kwjax.runtime.devices.forwarding import forward_batches
from kwjax.runtime.devices.parallel import DeviceGroup

_BATCH = 32


def channel_weights(
  parts: tuple[Part, ...],
  leaves: list[list[Any]],
  reference: Network,
  images: np.ndarray,
  group: DeviceGroup,
  should_stop: Callable[[], bool],
) -> list[Array]:
  r"""The mean square of the gradient of KL(float || student) by a unit's output, for each channel; f32[c] with mean 1.

  It is the diagonal of the Fisher information of the logits, averaged over images and positions. BRECQ weights each element
  of each image by its own; an average over channels needs no memory of the size of the features.

  Args:
    parts: the units in the hard form.
    leaves: variables of each of them.
    reference: the float network.
    images: f32[n,h,w,c] in [0,1].
    group: devices.
    should_stop: asked between batches.

  Source: Li et al. (2021), "BRECQ", arXiv:2102.05426, section 3.3.
  """
  batches = forward_batches(
    _squares,
    (leaves, reference),
    images,
    batch_size=_BATCH,
    description="importance of channels",
    devices=group,
    should_stop=should_stop,
    options={"parts": parts},
  )
  total = [np.zeros(()) for _ in parts]
  for found, _ in batches:
    total = [sum_ + rows.sum(0) for sum_, rows in zip(total, found, strict=True)]
  # A unit whose channels all have no gradient counts them alike.
  means = [np.where(sum_.mean() > 0, sum_ / np.maximum(sum_.mean(), 1e-30), 1.0) for sum_ in total]
  return [jnp.asarray(mean, jnp.float32) for mean in means]


def _squares(
  constants: tuple[list[list[Any]], Network],
  images: Array,
  weights: Array | None,
  axis_name: str | None,
  parts: tuple[Part, ...],
) -> list[Array]:
  """Sum over this device's images of the squared gradients, averaged over positions; f32[c] of each unit."""
  leaves, reference = constants
  wanted = jax.nn.softmax(reference.forward(reference.variables, images)[0].astype(jnp.float32))

  def divergence(moved: list[Array]) -> Array:
    x = images
    for part, own, by in zip(parts, leaves, moved, strict=True):
      x = part(own, x) + by
    by_image = -jnp.sum(wanted * jax.nn.log_softmax(x.astype(jnp.float32)), -1)
    return jnp.sum(by_image if weights is None else weights * by_image)

  shapes, x = [], jax.eval_shape(lambda: images)
  for part, own in zip(parts, leaves, strict=True):
    x = jax.eval_shape(part, own, x)
    shapes.append(x)
  gradients = jax.grad(divergence)([jnp.zeros(shape.shape, shape.dtype) for shape in shapes])
  squares = [jnp.square(gradient.astype(jnp.float32)) for gradient in gradients]
  return [square.reshape(len(square), -1, square.shape[-1]).mean(1).sum(0) for square in squares]
