"""Swing convolutions: a strided convolution sees its input from a random offset at each step."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from kwjax.intercept import intercept, kind_of, layer_name
from kwjax.network import ApplyFn, Array


def swinging(apply: ApplyFn, key: Array) -> ApplyFn:
  """Wrap `apply` so that every convolution with a stride s > 1 sees its input shifted by a random offset.

  The input is padded by s - 1 reflected pixels on both sides of an axis, and cropped to its size at an offset in 0 .. 2(s - 1).
  Without it a strided convolution reads some pixels more often than others, and the image gradient shows a checkerboard. All
  images of a batch share an offset, on any number of devices. Each layer has its own.

  Args:
    apply: the network.
    key: PRNG key of the step.

  Source: Jeon et al. (2023), "Genie: Show Me the Data for Quantization", section 3.2.
  """

  def handle(module: nn.Module, x: Array, proceed: Callable[[Array], Array]) -> Array:
    layer_key = jax.random.fold_in(key, zlib.crc32(layer_name(module).encode()) % 2**31)
    return proceed(shifted(x, strides_of(module), layer_key))

  return intercept(apply, lambda module: any(s > 1 for s in strides_of(module)), handle)


def strides_of(module: nn.Module) -> tuple[int, ...]:
  """Strides of a convolution, one for each spatial axis; () of any other module."""
  if not isinstance(module, nn.Conv) or kind_of(module) != nn.Conv.__name__:
    return ()
  axes = 1 if isinstance(module.kernel_size, int) else len(module.kernel_size)
  strides = module.strides
  return (1,) * axes if strides is None else (strides,) * axes if isinstance(strides, int) else tuple(strides)


def shifted(x: Array, strides: tuple[int, ...], key: Array) -> Array:
  """Input f32[b, *spatial, c], padded by reflection, cropped to its size at a random offset along axes of stride > 1."""
  first = x.ndim - 1 - len(strides)
  pads = [(0, 0)] * x.ndim
  for axis, stride in enumerate(strides, first):
    pads[axis] = (min(stride, x.shape[axis]) - 1,) * 2
  padded = jnp.pad(x, pads, mode="reflect")
  spans = [2 * pad + 1 for pad, _ in pads]
  offsets = jnp.floor(jax.random.uniform(key, (x.ndim,)) * jnp.asarray(spans)).astype(jnp.int32)
  return jax.lax.dynamic_slice(padded, tuple(offsets), x.shape)
