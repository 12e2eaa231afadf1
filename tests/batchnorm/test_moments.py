"""Moments against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.batchnorm import Moments, batch_moments, merge, pool


def test_moments_match_float64_where_the_plain_one_pass_form_fails() -> None:
  x = np.random.default_rng(0).normal(10.0, 0.1, (64, 8, 8, 3)).astype(np.float32)
  exact = x.astype(np.float64).var((0, 1, 2))
  got = jax.jit(batch_moments)(x, shift=jnp.full(3, 9.9))
  np.testing.assert_allclose(got.var, exact, rtol=2e-6)
  np.testing.assert_allclose(got.mean, x.astype(np.float64).mean((0, 1, 2)), rtol=1e-6)
  naive = (x**2).mean((0, 1, 2)) - x.mean((0, 1, 2)) ** 2
  assert np.abs(naive / exact - 1).max() > 1e-4


@pytest.mark.parametrize("axis", [-1, 1])
def test_feature_axis(axis: int) -> None:
  x = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
  got = batch_moments(x, feature_axis=axis)
  others = tuple(i for i in range(3) if i != axis % 3)
  np.testing.assert_allclose(got.mean, x.mean(others), atol=1e-6)
  np.testing.assert_allclose(got.var, x.var(others), atol=1e-6)


def test_constant_channel_has_zero_variance_and_finite_gradient() -> None:
  x = jnp.full((4, 2), 3.0)
  assert float(batch_moments(x, shift=jnp.zeros(2)).var.min()) >= 0.0
  gradient = jax.grad(lambda x: jnp.log(batch_moments(x).var + 1e-8).sum())(x)
  assert bool(jnp.isfinite(gradient).all())


def test_moments_over_devices_equal_those_of_the_whole_batch() -> None:
  x = np.random.default_rng(0).normal(2.0, 3.0, (8, 4, 5)).astype(np.float32)
  shift = jnp.ones(5)
  whole = batch_moments(x, shift=shift)
  split = jax.pmap(lambda x: batch_moments(x, shift=shift, axis_name="d"), axis_name="d")(x)
  np.testing.assert_allclose(split.mean[3], whole.mean, rtol=1e-6)
  np.testing.assert_allclose(split.var[5], whole.var, rtol=1e-5)


@pytest.mark.parametrize("axis", [-1, 1])
def test_weighted_moments_are_the_weighted_averages(axis: int) -> None:
  x = np.random.default_rng(0).normal(10.0, 0.1, (6, 4, 5)).astype(np.float32)
  w = np.array([1.0, 0.0, 0.5, 2.0, 0.0, 1.0], np.float32)
  got = batch_moments(x, feature_axis=axis, shift=jnp.full(x.shape[axis], 9.9), weights=w)
  other = 1 if axis == -1 else 2
  exact = x.astype(np.float64)
  mean = np.average(exact.mean(other), axis=0, weights=w)
  centred = exact - np.expand_dims(mean, other - 1)
  np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
  np.testing.assert_allclose(got.var, np.average(np.square(centred).mean(other), axis=0, weights=w), rtol=1e-5)


def test_weighted_moments_over_devices_of_unequal_weight() -> None:
  x = np.random.default_rng(0).normal(2.0, 3.0, (13, 4, 5)).astype(np.float32)
  padded = np.concatenate([x, np.full((3, 4, 5), 99.0, np.float32)]).reshape(8, 2, 4, 5)
  weights = (np.arange(16) < 13).astype(np.float32).reshape(8, 2)  # devices hold 2, 1 and 0 images
  shift = jnp.ones(5)
  split = jax.pmap(lambda x, w: batch_moments(x, shift=shift, axis_name="d", weights=w), axis_name="d")(padded, weights)
  whole = batch_moments(x, shift=shift)
  for device in (0, 6, 7):
    np.testing.assert_allclose(split.mean[device], whole.mean, rtol=1e-6)
    np.testing.assert_allclose(split.var[device], whole.var, rtol=1e-5)


def test_moments_of_no_weight_are_finite_and_so_is_their_gradient() -> None:
  x, w = jnp.full((4, 2), 3.0), jnp.zeros(4)
  got = batch_moments(x, shift=jnp.ones(2), weights=w)
  np.testing.assert_array_equal(got.mean, 1.0)
  np.testing.assert_array_equal(got.var, 0.0)
  gradient = jax.grad(lambda x: jnp.log(batch_moments(x, weights=w).var + 1e-8).sum())(x)
  np.testing.assert_array_equal(gradient, 0.0)


def test_merge_of_unequal_batches_equals_the_moments_of_all() -> None:
  x = np.random.default_rng(0).normal(5.0, 2.0, (17, 3)).astype(np.float32)
  total = None
  for part in (x[:3], x[3:4], x[4:]):
    total = merge(total, batch_moments(part, shift=np.full(3, 5.0)), len(part))
  assert total is not None
  assert total.samples == 17
  np.testing.assert_allclose(total.mean, x.astype(np.float64).mean(0), rtol=1e-6)
  np.testing.assert_allclose(total.var, x.astype(np.float64).var(0), rtol=1e-6)


def test_pool_of_equal_samples() -> None:
  x = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32) + np.array([[[0.0]], [[4.0]]])
  parts = [Moments(jnp.asarray(p.mean(0)), jnp.asarray(p.var(0))) for p in x]
  got = pool(parts)
  np.testing.assert_allclose(got.mean, x.reshape(-1, 3).mean(0), rtol=1e-6)
  np.testing.assert_allclose(got.var, x.reshape(-1, 3).var(0), rtol=1e-6)


def test_moments_can_be_differentiated_forwards_backwards_and_twice():
  x = jax.random.normal(jax.random.key(3), (4, 3, 2)) * 3.0 + 5.0

  def plain(x):
    mean = x.mean((0, 1))
    return mean, ((x - mean) ** 2).mean((0, 1))

  def scalar(function, x):
    mean, var = function(x)
    return jnp.sum(jnp.sin(mean) * var + var**2)

  for transform in (jax.grad, jax.hessian, lambda f: jax.jacfwd(jax.jacrev(f)), lambda f: jax.jacfwd(f)):
    ours, theirs = (transform(functools.partial(scalar, f))(x) for f in (lambda x: tuple(batch_moments(x)), plain))
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(6, 5, 7, 3), (9, 4, 1), (8, 2)])
def test_moments_and_gradients_of_few_channels_match_float64(shape: tuple[int, ...]) -> None:
  x = np.random.default_rng(0).normal(10.0, 0.5, shape).astype(np.float32)
  exact, axes = x.astype(np.float64), tuple(range(len(shape) - 1))
  got = batch_moments(x)
  np.testing.assert_allclose(got.mean, exact.mean(axes), rtol=1e-6)
  np.testing.assert_allclose(got.var, exact.var(axes), rtol=1e-5)
  gradient = jax.grad(lambda x: batch_moments(x).var.sum() + 3.0 * batch_moments(x).mean.sum())(jnp.asarray(x))
  count = exact[..., 0].size
  np.testing.assert_allclose(gradient, (2.0 * (exact - exact.mean(axes)) + 3.0) / count, rtol=2e-5, atol=1e-7)
