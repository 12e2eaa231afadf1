"""Soft rounding against its formulas in NumPy and against finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.quantization.grids import activation_grid, weight_grid
from kwjax.reconstruction.rounding import (
  Step,
  dropped,
  hard_levels,
  initial_offsets,
  offsets,
  rounded_to_steps,
  soft_kernel,
  split_weights,
  undecided,
)

RNG = np.random.default_rng(1)


def test_offsets_are_the_rectified_sigmoid_and_have_an_inverse() -> None:
  v = np.linspace(-6, 6, 41)
  expected = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
  np.testing.assert_allclose(offsets(jnp.asarray(v)), expected, atol=1e-6)
  shares = np.linspace(0, 1, 21)
  np.testing.assert_allclose(offsets(initial_offsets(jnp.asarray(shares))), shares, atol=1e-6)


@pytest.mark.parametrize("scheme", ["affine", "affine0", "sym", "symfull", "midrise"])
def test_a_soft_kernel_begins_as_the_float_one_and_ends_on_the_grid_within_a_level(scheme: str) -> None:
  kernel = jnp.asarray(RNG.normal(size=(3, 3, 4, 5)), jnp.float32)
  grid = weight_grid(kernel, scheme, 3, axes=(0, 1, 2))
  weight, v = split_weights(kernel, grid)
  top, bottom = (grid.qmax - grid.zero) * grid.scale, (grid.qmin - grid.zero) * grid.scale
  np.testing.assert_allclose(soft_kernel(weight, v), np.clip(kernel, bottom, top), atol=1e-5)
  for moved in (v, v + 9.0, v - 9.0):
    levels = hard_levels(weight, moved)
    assert levels.min() >= grid.qmin
    assert levels.max() <= grid.qmax
    assert np.abs((levels - grid.zero) * grid.scale - np.clip(kernel, bottom, top)).max() <= grid.scale.max() * 1.001
  # Undecided offsets, rounded as they are, are the nearest levels.
  nearest = np.clip(np.round(kernel / grid.scale + grid.zero), grid.qmin, grid.qmax)
  far_from_a_tie = np.abs(np.asarray(kernel / grid.scale + grid.zero) % 1 - 0.5) > 1e-4
  np.testing.assert_array_equal(np.asarray(hard_levels(weight, v))[far_from_a_tie], nearest[far_from_a_tie])


def test_rounding_to_steps_is_that_of_the_student_and_has_the_published_gradients() -> None:
  x = jnp.asarray(RNG.normal(size=200) * 2, jnp.float32)
  grid = activation_grid(-1.0, 2.5, 4)
  step = Step(grid.scale, grid.zero)
  expected = (np.clip(np.round(x / grid.scale + grid.zero), 0, 15) - grid.zero) * grid.scale
  np.testing.assert_allclose(rounded_to_steps(x, step, 4), expected, atol=1e-6)
  to_x = jax.grad(lambda x: rounded_to_steps(x, step, 4).sum())(x)
  position = np.asarray(x / grid.scale + grid.zero)
  inside = (np.round(position) > 0) & (np.round(position) < 15)
  np.testing.assert_array_equal(to_x[inside], 1.0)
  outside = (position < -0.5) | (position > 15.5)
  np.testing.assert_array_equal(to_x[outside], 0.0)
  to_scale = jax.vmap(jax.grad(lambda s, x: rounded_to_steps(x, Step(s, grid.zero), 4)), (None, 0))(grid.scale, x)
  # Esser et al. (2020), equation 3.
  np.testing.assert_allclose(to_scale[inside], (np.round(position) - position)[inside], atol=1e-4)
  ends = np.where(position < 0, 0, 15) - grid.zero
  np.testing.assert_allclose(to_scale[outside], ends[outside], atol=1e-4)


def test_the_dropped_share_is_the_one_asked_for_and_changes_with_the_key() -> None:
  x, rounded = jnp.ones((64, 9, 7, 5)), jnp.zeros((64, 9, 7, 5))
  draws = [np.asarray(dropped(jax.random.key(seed), jnp.float32(0.25), x, rounded)) for seed in range(3)]
  for kept in draws:
    assert kept.mean() == pytest.approx(0.25, abs=0.01)
    # No pattern along an axis: neighbours agree as often as independent draws do.
    for axis in range(4):
      agree = np.mean(
        np.take(kept, range(1, kept.shape[axis]), axis) == np.take(kept, range(kept.shape[axis] - 1), axis)
      )
      assert agree == pytest.approx(0.25**2 + 0.75**2, abs=0.02)
  assert np.mean(draws[0] == draws[1]) == pytest.approx(0.25**2 + 0.75**2, abs=0.02)
  assert not np.asarray(dropped(jax.random.key(0), jnp.float32(0.0), x, rounded)).any()
  assert np.asarray(dropped(jax.random.key(0), jnp.float32(1.0), x, rounded)).all()


def test_the_regularizer_counts_undecided_offsets() -> None:
  v = initial_offsets(jnp.asarray([0.0, 0.5, 1.0, 0.75]))
  assert float(undecided(v, 2.0)) == pytest.approx(1.0 + (1 - 0.5**2), abs=1e-5)
