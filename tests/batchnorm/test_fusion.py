"""What the sums of a BatchNorm layer leave in memory, read off the programs that XLA compiles for CPUs."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from kwjax.batchnorm import batch_moments, observing
from tests.networks import random_network

SHAPE = (8, 16, 16, 48)  # of the layer's input

if jax.devices()[0].platform != "cpu":
  pytest.skip("how XLA fuses on CPUs", allow_module_level=True)


def loops(function: Callable, *args: jax.Array) -> int:
  """Loops of the compiled program whose result has the shape of the layer's input, with or without the axis of devices."""
  text = function.lower(*args).compile().as_text()
  entry = text[text.index("\nENTRY") :]
  batch, *rest = map(str, SHAPE)
  wanted = tuple(f"= f32[{first},{','.join(rest)}]" for first in (batch, f"1,{batch}"))
  return sum("kind=kLoop" in line and any(shape in line for shape in wanted) for line in entry.splitlines())


def test_moments_with_their_gradient_store_no_differences() -> None:
  """x - mean has a use in the backward pass too: XLA would store it for both. One loop is left, the gradient's."""
  kernel = jnp.ones((1, 1, 32, 48))

  def loss(x: jax.Array) -> jax.Array:
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    got = batch_moments(y)
    return jnp.sum(jnp.log(got.var + 1e-5) + got.mean**2)

  assert loops(jax.jit(jax.grad(loss)), jnp.ones((8, 16, 16, 32))) == 1


class OneLayer(nn.Module):
  """A convolution, BatchNorm and an activation between two products."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(48, (3, 3), use_bias=False)(x)))
    return nn.Conv(8, (3, 3), use_bias=False)(x).mean((1, 2))


def test_normalizing_by_the_batch_with_its_gradient_stores_no_differences() -> None:
  """Two loops over devices: what the next convolution reads, and the gradient of what this one wrote."""
  network = random_network(OneLayer(), image_shape=(16, 16, 32))
  observed = observing(network.forward, axis_name="d", current=(".*",))

  def loss(params: dict, x: jax.Array) -> jax.Array:
    logits, _ = observed({**network.variables, "params": params}, x)
    return jnp.sum(jnp.sin(logits))

  gradient = jax.pmap(jax.grad(loss), axis_name="d", in_axes=(None, 0), devices=jax.devices()[:2])
  assert loops(gradient, network.variables["params"], jnp.ones((2, 8, 16, 16, 32))) == 2
