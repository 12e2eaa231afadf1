"""fake_quant against NumPy, and its straight-through gradient."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.quantization import fake_quant


def reference(x, scale, zero, qmin, qmax):
  """Float64, level by level: pick the nearest of all levels, ties to the even one."""
  levels = np.arange(qmin, qmax + 1)
  position = np.asarray(x, np.float64) / scale + zero
  distance = np.abs(position[..., None] - levels) + 1e-9 * (levels % 2)
  return (levels[distance.argmin(-1)] - zero) * scale


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_matches_reference_for_every_width(bits, signed):
  x = jax.random.normal(jax.random.key(bits), (4, 5, 3)) * 2
  qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
  scale, zero = 3.0 / 2**bits, 0 if signed else 2 ** (bits - 2)
  found = fake_quant(x, scale, zero, qmin, qmax)
  np.testing.assert_allclose(found, reference(x, scale, zero, qmin, qmax), rtol=1e-6, atol=1e-7)
  assert len(np.unique(found)) <= 2**bits
  assert found.dtype == x.dtype


def test_ties_round_to_even_and_ends_clip():
  x = jnp.array([-9.0, -1.5, -0.5, 0.5, 1.5, 2.5, 9.0])
  np.testing.assert_array_equal(fake_quant(x, 1.0, 0.0, -2, 3), [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 3.0])


def test_real_zero_point_shifts_the_levels():
  # Levels (k - 1.5) * 2 for k = 0..3: -3, -1, 1, 3; there is none at zero.
  np.testing.assert_array_equal(fake_quant(jnp.array([-5.0, -1.2, 0.4, 5.0]), 2.0, 1.5, 0, 3), [-3.0, -1.0, 1.0, 3.0])


def test_gradient_passes_inside_and_stops_where_clipped():
  x = jnp.array([-1.2, -0.2, 0.0, 0.7, 2.4, 3.6, 30.0])
  gradient = jax.grad(lambda v: jnp.sum(fake_quant(v, 1.0, 0.0, 0, 3) * jnp.arange(1.0, 8.0)))(x)
  # -0.2 rounds to level 0 and 2.4 to 2: not clipped. 3.6 rounds to 4, beyond the last level.
  np.testing.assert_array_equal(gradient, [0.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0])


def test_no_gradient_to_the_grid():
  x = jax.random.normal(jax.random.key(0), (6, 4))
  loss = lambda scale, zero, qmax: jnp.sum(fake_quant(x, scale, zero, 0.0, qmax) ** 2)
  for gradient in jax.grad(loss, argnums=(0, 1, 2))(jnp.full((4,), 0.1), jnp.full((4,), 7.0), jnp.float32(15)):
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


class EachWay(chex.TestCase):
  """One value and one gradient, however the function is transformed."""

  @chex.all_variants
  def test_value_and_gradient_are_those_of_the_reference(self):
    x = np.asarray(jax.random.normal(jax.random.key(1), (5, 7, 4)))
    scale, zero = np.linspace(0.05, 0.2, 4, dtype=np.float32), np.arange(4, dtype=np.float32) + 4

    @self.variant(n_devices=2)
    def run(x, scale, zero, low, high):
      value, pullback = jax.vjp(lambda v: fake_quant(v, scale, zero, low, high), x)
      return value, pullback(jnp.cos(x))[0]

    value, gradient = run(x, scale, zero, 0, 15)
    np.testing.assert_allclose(value, reference(x, scale, zero, 0, 15), rtol=1e-6, atol=1e-7)
    position = np.round(x / scale + zero)
    np.testing.assert_allclose(gradient, np.where((position >= 0) & (position <= 15), np.cos(x), 0), rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_same_under_vmap_and_remat(self):
    x = jax.random.normal(jax.random.key(1), (5, 7, 4))
    scale, zero = jnp.linspace(0.05, 0.2, 4), jnp.arange(4.0) + 4
    run = lambda v, s, z: fake_quant(v, s, z, 0, 15)
    forms = {
      "vmap": jax.vmap(run, (0, None, None)),
      "vmap over channels": jax.vmap(run, (2, 0, 0), 2),
      "remat": jax.checkpoint(run),
    }
    gradient = lambda f: jax.grad(lambda v: jnp.sum(jnp.sin(f(v, scale, zero))))(x)
    expected, expected_gradient = run(x, scale, zero), gradient(run)
    for name, form in forms.items():
      np.testing.assert_array_equal(self.variant(form)(x, scale, zero), expected, err_msg=name)
      found = gradient(self.variant(form))
      np.testing.assert_allclose(found, expected_gradient, rtol=1e-6, atol=1e-7, err_msg=name)


def test_bfloat16_is_rounded_in_float32():
  x = jnp.linspace(-1, 1, 999).astype(jnp.bfloat16)
  scale, zero = np.float32(2 / 255), 128
  found = fake_quant(x, scale, zero, 0, 255)
  assert found.dtype == jnp.bfloat16
  expected = fake_quant(x.astype(jnp.float32), scale, zero, 0, 255).astype(jnp.bfloat16)
  np.testing.assert_array_equal(found.astype(jnp.float32), expected.astype(jnp.float32))
  assert jax.grad(lambda v: fake_quant(v, scale, zero, 0, 255).astype(jnp.float32).sum())(x).dtype == jnp.bfloat16


def test_backward_keeps_a_mask_and_not_the_activations():
  x = jnp.ones((32, 32))
  _, pullback = jax.vjp(lambda v: fake_quant(v, 0.1, 3.0, 0, 15), x)
  kept = [leaf for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "dtype") and leaf.size == x.size]
  assert [leaf.dtype for leaf in kept] == [jnp.bool_]
