"""A calibrated student with a residual block, and images."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest

from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork, QuantRules, calibrate, quantize
from tests.networks import random_network


class Residual(nn.Module):
  """A stem, a residual block of two convolutions, a classifier."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    norm = lambda name: nn.BatchNorm(use_running_average=not train, name=name)
    x = nn.relu(norm("stem_bn")(nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)))
    y = nn.relu(norm("bn1")(nn.Conv(8, (3, 3), use_bias=False, name="conv1")(x)))
    y = norm("bn2")(nn.Conv(8, (3, 3), use_bias=False, name="conv2")(y))
    return nn.Dense(4, name="classifier")(nn.relu(x + y).mean((1, 2)))


def student_of(network: Network, images: np.ndarray, bits: str = "3w4a", **options: object) -> QuantizedNetwork:
  rules = QuantRules.parse(bits, **{"weights": "symfull", **options})
  ranges = calibrate(network, images, rules, key=jax.random.key(0), steps=4, batch_size=8, chunk=4)
  return quantize(network, rules, ranges)


@pytest.fixture(scope="session")
def residual() -> Network:
  return random_network(Residual(), image_shape=(6, 6, 3), seed=3)


@pytest.fixture(scope="session")
def pictures() -> np.ndarray:
  return np.random.default_rng(0).uniform(size=(24, 6, 6, 3)).astype(np.float32)


@pytest.fixture(scope="session")
def student(residual: Network, pictures: np.ndarray) -> QuantizedNetwork:
  return student_of(residual, pictures)
