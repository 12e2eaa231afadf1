"""How long some work would take: operations from the layers' shapes, the rate of this machine from a quick probe."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.network import Network

EFFICIENCY = 0.3
"""Of a matrix product's rate; what whole networks reached on CPUs and GPUs."""


def matmul_rate(size: int = 1024, repeats: int = 5) -> float:
  """Floating-point operations a second of a float32 matrix product on the default device, the best of a few."""
  x = jnp.ones((size, size), jnp.float32)
  product = jax.jit(lambda a: a @ a)
  product(x).block_until_ready()
  best = np.inf
  for _ in range(repeats):
    start = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def estimate(network: Network, *, synthesized: int, trained: int, evaluated: int) -> str:
  """A line about the time of some work, from the operations of the layers and the rate of a matrix product.

  Args:
    network: the float network.
    synthesized: images times copies times steps of all syntheses.
    trained: images times steps of all fine-tunings.
    evaluated: images forwarded.
  """
  forward = 2 * sum(layer.multiplications for layer in intercept.layers(network))
  # Backward to the images alone costs one more forward; the teacher, and backward to the weights, three more.
  total = forward * (2 * synthesized + 4 * trained + evaluated)
  rate = matmul_rate()
  return (
    f"time          about {total / (rate * EFFICIENCY) / 60:.1f} minutes if convolutions reach {EFFICIENCY:.0%} of the "
    f"{rate / 1e9:.0f} GFLOP/s that a matrix product just reached here ({jax.devices()[0].device_kind}), and compilation"
  )
