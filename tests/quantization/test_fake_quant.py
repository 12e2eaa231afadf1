"""fake_quant against NumPy, and its straight-through gradient."""

from __future__ import annotations

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


def test_same_under_jit_vmap_pmap_and_with_traced_limits():
  x = jax.random.normal(jax.random.key(1), (5, 7, 4))
  scale, zero = jnp.linspace(0.05, 0.2, 4), jnp.arange(4.0) + 4
  run = lambda v, s, z, low, high: fake_quant(v, s, z, low, high)
  expected = run(x, scale, zero, 0, 15)
  grad = lambda f: jax.grad(lambda v: jnp.sum(jnp.sin(f(v))))(x)
  expected_gradient = grad(lambda v: run(v, scale, zero, 0, 15))
  forms = {
    "jit": lambda v: jax.jit(run, static_argnums=(3, 4))(v, scale, zero, 0, 15),
    "traced limits": lambda v: jax.jit(run)(v, scale, zero, 0, 15),
    "vmap": lambda v: jax.vmap(run, (0, None, None, None, None))(v, scale, zero, 0, 15),
    "vmap over channels": lambda v: jax.vmap(run, (2, 0, 0, None, None), 2)(v, scale, zero, 0, 15),
    "pmap": lambda v: jax.pmap(lambda w: run(w, scale, zero, 0, 15))(v[None])[0],
    "remat": lambda v: jax.checkpoint(lambda w: run(w, scale, zero, 0, 15))(v),
  }
  for name, form in forms.items():
    np.testing.assert_array_equal(form(x), expected, err_msg=name)
    np.testing.assert_allclose(grad(form), expected_gradient, rtol=1e-6, atol=1e-7, err_msg=name)


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
