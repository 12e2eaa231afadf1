"""Fixtures that make small networks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork
from tests.export.networks import quantized, random_network


@pytest.fixture(scope="session")
def images() -> np.ndarray:
  return np.random.default_rng(7).random((24, 8, 8, 3), np.float32)


@pytest.fixture(scope="session")
def make() -> Callable[..., Network]:
  """`(module, shape=(8, 8, 3), seed=0) -> Network`."""
  return random_network


@pytest.fixture(scope="session")
def make_quantized() -> Callable[..., QuantizedNetwork]:
  """`(network, bits, weight scheme, **rules) -> QuantizedNetwork`."""
  return quantized
