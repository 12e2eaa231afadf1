"""Max pooling on CPUs against Flax's and PyTorch's, ties included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.kernels.pooling import max_pool as pool_windows
from kwjax.kernels.windows import Window
from kwjax.models.layers import MaxPool, global_average_pool


def max_pool(images, size, stride, padding):
  return pool_windows(images, Window((size, size), (stride, stride), ((padding, padding), (padding, padding))))


def _rounded_images(shape):
  """Few distinct values, as after a ReLU: nearly every window has ties."""
  return jax.nn.relu(jnp.round(jax.random.normal(jax.random.key(0), shape)))


@pytest.mark.parametrize(
  ("shape", "size", "stride", "padding"),
  [
    ((2, 8, 8, 3), 3, 2, 1),
    ((2, 7, 9, 3), 3, 2, 1),
    ((2, 7, 9, 3), 2, 2, 0),
    ((2, 8, 8, 3), 3, 1, 1),
    ((2, 7, 9, 3), 3, 4, 1),
    ((1, 1, 1, 2), 3, 2, 1),
  ],
)
def test_equals_flax_in_value_and_gradient(shape, size, stride, padding):
  images = _rounded_images(shape)
  cotangent = jax.random.normal(jax.random.key(1), max_pool(images, size, stride, padding).shape)

  def value_and_gradient(pool):
    value, vjp = jax.vjp(pool, images)
    return value, vjp(cotangent)[0]

  native = lambda x: MaxPool(size, stride, padding).apply({}, x)
  expected = jax.jit(value_and_gradient, static_argnums=0)(native)
  found = jax.jit(value_and_gradient, static_argnums=0)(lambda x: max_pool(x, size, stride, padding))
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_allclose(found[1], expected[1], rtol=1e-6, atol=1e-6)


def test_ties_go_to_the_first_pixel_as_in_pytorch():
  torch = pytest.importorskip("torch")
  images = _rounded_images((2, 8, 6, 3))
  theirs = torch.tensor(np.asarray(images).transpose(0, 3, 1, 2), requires_grad=True)
  pooled = torch.nn.functional.max_pool2d(theirs, 3, 2, 1)
  cotangent = np.random.default_rng(0).normal(size=tuple(pooled.shape)).astype(np.float32)
  pooled.backward(torch.tensor(cotangent))
  ours = jax.vjp(lambda x: max_pool(x, 3, 2, 1), images)[1](jnp.asarray(cotangent.transpose(0, 2, 3, 1)))[0]
  np.testing.assert_allclose(ours, theirs.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-6, atol=1e-6)


def test_global_average_pool():
  images = jnp.arange(12.0).reshape(1, 2, 3, 2)
  np.testing.assert_allclose(global_average_pool(images), [[5.0, 6.0]])
