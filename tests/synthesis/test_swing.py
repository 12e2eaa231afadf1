"""Swing convolutions against shifts made with NumPy."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.synthesis import SynthesisConfig, initial_state, synthesis_step
from kwjax.synthesis.swing import shifted, swinging
from tests.networks import random_network, tiny_network


@pytest.mark.parametrize(("strides", "possible"), [((2, 2), 9), ((2, 1), 3), ((3, 1), 5)])
def test_every_shift_of_the_reflected_image_occurs_and_nothing_else(strides: tuple[int, int], possible: int) -> None:
  x = np.asarray(jax.random.uniform(jax.random.key(1), (2, 6, 5, 3)))
  tall, wide = (s - 1 for s in strides)
  padded = np.pad(x, ((0, 0), (tall, tall), (wide, wide), (0, 0)), mode="reflect")
  wanted = {padded[:, i : i + 6, j : j + 5].tobytes() for i in range(2 * tall + 1) for j in range(2 * wide + 1)}
  draw = jax.jit(lambda key: shifted(x, strides, key))
  found = {np.asarray(draw(key)).tobytes() for key in jax.random.split(jax.random.key(2), 60)}
  assert found == wanted
  assert len(wanted) == possible


class Strided(nn.Module):
  """Two strided convolutions and, between them, one that is not."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i, strides in enumerate(((2, 2), None, 2)):
      x = nn.Conv(4, (1, 1), strides, name=f"conv{i}")(x)
    return x.mean((1, 2))


def test_each_strided_convolution_of_a_network_has_its_own_shift() -> None:
  network = random_network(Strided())
  images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
  kernels = [np.asarray(network.variables["params"][f"conv{i}"]["kernel"])[0, 0] for i in range(3)]
  biases = [np.asarray(network.variables["params"][f"conv{i}"]["bias"]) for i in range(3)]

  def logits(first: tuple[int, int], second: tuple[int, int]) -> np.ndarray:
    x = (np.asarray(images) - 0.45) / 0.25
    for kernel, bias, offset in zip(kernels, biases, (first, None, second), strict=True):
      if offset is not None:
        pads = ((0, 0), (1, 1), (1, 1), (0, 0))
        h, w = x.shape[1:3]
        x = np.pad(x, pads, mode="reflect")[:, offset[0] : offset[0] + h, offset[1] : offset[1] + w][:, ::2, ::2]
      x = x @ kernel + bias
    return x.mean((1, 2))

  offsets = [(i, j) for i in range(3) for j in range(3)]
  possible = {(one, two): logits(one, two) for one in offsets for two in offsets}
  forward = jax.jit(lambda key: swinging(network.forward, key)(network.variables, images)[0])
  drawn = []
  for seed in range(12):
    found = np.asarray(forward(jax.random.key(seed)))
    drawn.append(min(possible, key=lambda pair: np.abs(possible[pair] - found).max()))
    np.testing.assert_allclose(found, possible[drawn[-1]], atol=1e-5)
  assert any(one != two for one, two in drawn)
  assert len({one for one, _ in drawn}) > 2


def test_a_step_swings_only_when_it_is_asked_to() -> None:
  network, labels = tiny_network(), jnp.arange(4) % 5
  images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 3))
  losses = {}
  for swing in (False, True):
    config = SynthesisConfig(batch_size=4, duplicates=1, steps=5, swing=swing)
    step = jax.jit(lambda key, c=config: synthesis_step(initial_state(c, images), labels, network, key, c)[1]["loss"])
    losses[swing] = [float(step(jax.random.key(seed))) for seed in range(6)]
  assert len(set(losses[False])) == 1
  assert len(set(losses[True])) > 2
