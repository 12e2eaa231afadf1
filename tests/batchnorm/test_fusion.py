"""The sums of a BatchNorm layer are written for XLA's fusion: their derivatives are those of the formulas."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kwjax.batchnorm import observing
from tests.networks import random_network


class OneLayer(nn.Module):
  """BatchNorm and its input."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(5, (3, 3), use_bias=False)(x))).mean((1, 2))


def test_normalizing_by_the_batch_has_the_gradients_of_the_formula() -> None:
  network = random_network(OneLayer(), image_shape=(6, 5, 3))
  images = jax.random.uniform(jax.random.key(0), (4, 6, 5, 3))
  observed = observing(network.forward, current=(".*",))

  def found(params: dict) -> jax.Array:
    return jnp.sum(jnp.sin(observed({**network.variables, "params": params}, images)[0]))

  def expected(params: dict) -> jax.Array:
    x = nn.Conv(5, (3, 3), use_bias=False).apply({"params": params["Conv_0"]}, (images - 0.45) / 0.25)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    norm = params["BatchNorm_0"]
    y = (x - mean) / jnp.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    return jnp.sum(jnp.sin(nn.relu(y).mean((1, 2))))

  params = network.variables["params"]
  for ours, formula in zip(
    jax.tree.leaves(jax.value_and_grad(found)(params)),
    jax.tree.leaves(jax.value_and_grad(expected)(params)),
    strict=True,
  ):
    np.testing.assert_allclose(ours, formula, rtol=1e-4, atol=1e-5)
