"""Weight schemes against their closed forms, channel by channel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.errors import RuleError
from kwjax.quantization import WEIGHT_SCHEMES, activation_grid, fake_quant, weight_grid

SCHEMES = sorted(WEIGHT_SCHEMES)


def levels_by_definition(w, scheme, bits):
  """All levels of one channel, float64, written from the definitions alone."""
  lo, hi, top = w.min(), w.max(), np.abs(w).max()
  if scheme == "sym":
    n = 2 ** (bits - 1) - 1
    return np.arange(-n, n + 1) * top / n
  if scheme == "symfull":
    n = 2 ** (bits - 1)
    return np.arange(-n, n) * top / n
  if scheme == "affine":
    return np.linspace(lo, hi, 2**bits)
  if scheme == "midrise":
    return np.linspace(-top, top, 2**bits)
  lo, hi = min(lo, 0), max(hi, 0)
  scale = (hi - lo) / (2**bits - 1)
  return (np.arange(2**bits) - np.round(-lo / scale)) * scale


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_weight_goes_to_the_nearest_level_of_its_channel(scheme, bits):
  w = np.asarray(jax.random.normal(jax.random.key(bits), (3, 3, 4, 6))) * np.linspace(0.01, 3, 6) + np.linspace(
    -1, 1, 6
  )
  found = np.asarray(fake_quant(jnp.asarray(w), *weight_grid(jnp.asarray(w), scheme, bits, axes=(0, 1, 2))))
  for channel in range(6):
    column = w[..., channel].astype(np.float64)
    levels = levels_by_definition(column, scheme, bits)
    distance = np.abs(column[..., None] - levels).min(-1)
    step = levels[1] - levels[0]
    np.testing.assert_allclose(np.abs(found[..., channel] - column), distance, atol=2e-5 * step + 1e-6)
    # The tolerance of float32 around weights of size 1, when the step is as small as 1e-4.
    assert np.abs(found[..., channel][..., None] - levels).min(-1).max() < 1e-4 * step + 2e-7


def test_two_bit_midrise_is_thirds():
  w = jnp.array([[-0.9], [-0.2], [0.01], [0.5], [0.89]])
  found = fake_quant(w, *weight_grid(w, "midrise", 2, axes=(0,)))
  np.testing.assert_allclose(found[:, 0], np.array([-0.9, -0.3, 0.3, 0.3, 0.9]), rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_constant_and_tiny_channels_stay_finite(scheme, bits):
  columns = [np.zeros(5), np.full(5, 0.7), np.full(5, -0.7), np.full(5, 1e-42), np.linspace(-1e-30, 1e-30, 5)]
  w = jnp.asarray(np.stack(columns, -1), jnp.float32)
  grid = weight_grid(w, scheme, bits, axes=(0,))
  found, gradient = jax.value_and_grad(lambda v: fake_quant(v, *grid).sum())(w)
  assert np.isfinite(found)
  assert np.isfinite(gradient).all()
  assert (np.asarray(grid.scale) > 0).all()
  quantized = np.asarray(fake_quant(w, *grid))
  # Midrise has no level at zero, and the smallest that floats can tell from it.
  np.testing.assert_allclose(quantized[:, 0], 0, atol=1e-36 if scheme == "midrise" else 0)
  if scheme in ("affine", "affine0", "midrise", "sym"):
    np.testing.assert_allclose(quantized[:, 1:3], w[:, 1:3], rtol=1e-6)


def test_no_gradient_flows_through_the_scale():
  w = jnp.array([[0.3], [-1.0], [0.45]])
  gradient = jax.grad(lambda v: jnp.sum(fake_quant(v, *weight_grid(v, "sym", 4, axes=(0,)))))(w)
  # With the scale differentiated, the largest weight would carry the others' gradients too.
  np.testing.assert_array_equal(gradient, np.ones_like(w))


def test_unknown_scheme_is_named():
  with pytest.raises(RuleError, match=r"'median'.*affine"):
    weight_grid(jnp.ones((2, 2)), "median", 4, axes=(0,))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("lo", "hi"), [(0.5, 6.0), (-2.0, -1.0), (-1.3, 2.9), (0.0, 0.0)])
def test_activation_grid_holds_zero_exactly(bits, lo, hi):
  grid = activation_grid(jnp.float32(lo), jnp.float32(hi), bits)
  assert float(grid.zero) == round(float(grid.zero))
  assert (grid.qmin, grid.qmax) == (0, 2**bits - 1)
  assert float(fake_quant(jnp.float32(0), *grid)) == 0
  if hi > lo:
    extent = max(hi, 0) - min(lo, 0)
    np.testing.assert_allclose(grid.scale, extent / (2**bits - 1), rtol=1e-6)
    # Rounding the zero point moves either end by half a level at most.
    for end in (min(lo, 0), max(hi, 0)):
      assert abs(float(fake_quant(jnp.float32(end), *grid)) - end) <= 0.5001 * float(grid.scale)
