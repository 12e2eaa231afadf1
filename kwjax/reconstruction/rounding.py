"""Rounding that can be trained: offsets of weights (AdaRound) and steps of activations (LSQ), both with a gradient."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kwjax.network import Array
from kwjax.quantization.grids import Grid

_STRETCH, _SHIFT = 1.2, -0.1  # of the rectified sigmoid: zeta - gamma and gamma, 1.1 and -0.1


class Step(NamedTuple):
  """Levels of a layer's input: level k is (k - zero) * scale, 0 <= k < 2^bits.

  Attributes:
    scale: f32[] > 0, or one for each layer of a stack.
    zero: the level of 0, an integer, as `scale`.
  """

  scale: Array
  zero: Array


class Weight(NamedTuple):
  """What is not trained of a kernel.

  Attributes:
    floor: the level below each weight, f32, an integer.
    grid: of each channel.
  """

  floor: Array
  grid: Grid


def _through(x: Array) -> Array:
  """round(x) with the gradient of x."""
  return x + jax.lax.stop_gradient(jnp.round(x) - x)


def rounded_to_steps(x: Array, step: Step, bits: int) -> Array:
  r"""The nearest level, with gradients of x and of the scale: learned step size quantization.

  $\hat x = (\mathrm{clip}(\mathrm{round}(x / s + z), 0, 2^b - 1) - z) \, s$, equations 1 to 3 of the source;
  $\partial \hat x / \partial s = \mathrm{round}(x/s) - x/s$ inside the range and the clipped level minus z outside.

  Args:
    x: f32[...].
    step: of the layer.
    bits: b.

  Source: Esser et al. (2020), "Learned Step Size Quantization", arXiv:1902.08153.
  """
  wide = x.astype(jnp.float32)
  level = jnp.clip(_through(wide / step.scale + step.zero), 0, 2**bits - 1)
  return ((level - step.zero) * step.scale).astype(x.dtype)


def dropped(key: Array, keep: Array, x: Array, rounded: Array) -> Array:
  """The rounded values, of which each element keeps its float value with probability `keep`: QDrop.

  Args:
    key: PRNG key.
    keep: f32[] in [0, 1], rounded to a multiple of 1/256.
    x: float values.
    rounded: the same on their grid.

  Source: Wei et al. (2022), "QDrop", arXiv:2203.05740, equation 10.
  """
  return jnp.where(_bytes(key, x.shape) < jnp.round(256 * keep).astype(jnp.uint32), x, rounded)


def _bytes(key: Array, shape: tuple[int, ...]) -> Array:
  """A random number u32 below 256 for each element: its index, mixed with the key by the finalizer of MurmurHash3.

  `jax.random.bits` costs as much as the convolutions of a unit on CPUs: its words are stored and unpacked.
  """
  seed = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
  index, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  mixed = (index ^ seed[0]) * jnp.uint32(0x9E3779B1) + seed[-1]
  mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
  return (mixed ^ (mixed >> 16)) >> 24


def offsets(v: Array) -> Array:
  r"""$h(V) = \mathrm{clip}(1.2\,\sigma(V) - 0.1, 0, 1)$, the rectified sigmoid: by how much a weight is rounded up.

  Args:
    v: f32[...].

  Source: Nagel et al. (2020), "Up or Down? Adaptive Rounding", arXiv:2004.10568, equation 23.
  """
  return jnp.clip(_STRETCH * jax.nn.sigmoid(v) + _SHIFT, 0.0, 1.0)


def initial_offsets(share: Array) -> Array:
  """The V with h(V) = share, for shares in [0, 1]."""
  return -jnp.log(_STRETCH / (share - _SHIFT) - 1.0)


def split_weights(kernel: Array, grid: Grid) -> tuple[Weight, Array]:
  """What is not trained of a kernel, and the V with which it keeps its float values as far as the grid reaches.

  Args:
    kernel: f32[...].
    grid: of each channel.
  """
  position = jnp.clip(kernel.astype(jnp.float32) / grid.scale + grid.zero, grid.qmin, grid.qmax)
  # A weight at the end of the range would be pushed beyond it and have no gradient.
  floor = jnp.clip(jnp.floor(position), grid.qmin, grid.qmax - 1)
  return Weight(floor, grid), initial_offsets(position - floor)


def soft_kernel(weight: Weight, v: Array, log_scale: Array | float = 0.0) -> Array:
  r"""$\hat w = s\,e^{a}\,(\lfloor w/s + z\rfloor + h(V) - z)$: equation 22 of AdaRound, with a scale that can be trained.

  Args:
    weight: of the layer.
    v: V, f32 of the kernel's shape.
    log_scale: a, 0 for the scale of the grid, of its shape.
  """
  return (weight.floor + offsets(v) - weight.grid.zero) * (weight.grid.scale * jnp.exp(log_scale))


def hard_levels(weight: Weight, v: Array) -> Array:
  """The levels that weights end on: up where h(V) >= 1/2."""
  return weight.floor + (v >= 0.0)


def undecided(v: Array, beta: Array | float) -> Array:
  r"""$\sum 1 - |2h(V) - 1|^\beta$, equation 24 of AdaRound: the regularizer that drives offsets to 0 or 1; f32[].

  Args:
    v: V of a kernel.
    beta: large at first, so that only offsets near 0 and 1 feel it, small at the end.
  """
  return jnp.sum(1.0 - jnp.abs(2.0 * offsets(v) - 1.0) ** beta)
