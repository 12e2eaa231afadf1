"""Divergences against numerical integration, closed forms and each other."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.batchnorm import DIVERGENCES, Moments, bns_loss, gaussian_kl, moment_l2, moment_mse, std_mse
from kwjax.errors import KwjaxError


def moments(mean: list[float], var: list[float]) -> Moments:
  return Moments(jnp.array(mean, jnp.float32), jnp.array(var, jnp.float32))


class EachWay(chex.TestCase):
  """Each value and gradient with and without jit, from arrays on and off the device, and on two devices by pmap."""

  @chex.all_variants
  def test_gaussian_kl_equals_the_integral(self) -> None:
    mean, var, other_mean, other_var = 0.3, 0.7, -0.5, 1.9
    x = np.linspace(-30, 30, 400_001)

    def density(x: np.ndarray, m: float, v: float) -> np.ndarray:
      return np.exp(-((x - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)

    p, q = density(x, mean, var), density(x, other_mean, other_var)
    integral = np.trapezoid(p * (np.log(p + 1e-300) - np.log(q + 1e-300)), x)
    found = self.variant(gaussian_kl, n_devices=2)(moments([mean], [var]), moments([other_mean], [other_var]))
    np.testing.assert_allclose(found, [integral], rtol=1e-5)

  @chex.all_variants
  def test_peers_forms(self) -> None:
    a, b = moments([1.0, 2.0], [4.0, 9.0]), moments([1.5, 0.0], [1.0, 16.0])

    @self.variant(n_devices=2)
    def forms(a: Moments, b: Moments) -> tuple[jax.Array, ...]:
      gradient = jax.grad(lambda m: moment_l2(a, Moments(m, a.var)))(a.mean)
      return moment_mse(a, b), std_mse(a, b), moment_l2(a, b), gradient

    mse, std, norm, gradient = forms(a, b)
    np.testing.assert_allclose(mse, [0.25 + 9.0, 4.0 + 49.0], rtol=1e-6)
    np.testing.assert_allclose(std, [0.25 + 1.0, 4.0 + 1.0], rtol=1e-5)
    np.testing.assert_allclose(norm, np.sqrt(4.25) + np.sqrt(58.0), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)

  @chex.all_variants
  def test_bns_loss_is_the_mean_over_layers_of_the_channel_means(self) -> None:
    reference = {"a": moments([0.0] * 4, [1.0] * 4), "b": moments([0.0], [1.0])}
    measured = {"a": moments([1.0] * 4, [1.0] * 4), "b": moments([3.0], [1.0]), "ignored": moments([9.0], [9.0])}

    @self.variant(n_devices=2)
    def losses(reference: dict[str, Moments], measured: dict[str, Moments]) -> tuple[jax.Array, ...]:
      mean, gradient = jax.value_and_grad(lambda found: bns_loss(reference, found))(measured)
      return mean, bns_loss(reference, measured, channel_sum=True), gradient["b"].mean, gradient["ignored"].mean

    mean, total, gradient, ignored = losses(reference, measured)
    np.testing.assert_allclose(mean, (0.5 + 4.5) / 2, rtol=1e-5)
    np.testing.assert_allclose(total, (2.0 + 4.5) / 2, rtol=1e-5)
    np.testing.assert_allclose(gradient, [3.0 / 2], rtol=1e-5)
    np.testing.assert_array_equal(ignored, [0.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_every_divergence_is_zero_at_agreement(self) -> None:
    m = moments([0.2, 0.4], [0.5, 0.6])
    every = self.variant(lambda m: [bns_loss({"a": m}, {"a": m}, divergence=form) for form in DIVERGENCES.values()])
    np.testing.assert_allclose(every(m), np.zeros(len(DIVERGENCES)), atol=1e-6)


def test_gaussian_kl_is_zero_only_at_agreement_and_invariant_to_affine_maps() -> None:
  a, b = moments([0.1, -2.0], [0.5, 3.0]), moments([0.3, -1.0], [0.9, 2.0])
  np.testing.assert_allclose(gaussian_kl(a, a), 0.0, atol=1e-7)
  assert float(gaussian_kl(a, b).min()) > 1e-3
  scaled = [Moments(4 * m.mean + 7, 16 * m.var) for m in (a, b)]
  np.testing.assert_allclose(gaussian_kl(*scaled), gaussian_kl(a, b), rtol=1e-5)


def test_dead_channel_is_finite_with_finite_gradient() -> None:
  reference = moments([0.0], [0.0])
  value, gradient = jax.value_and_grad(lambda v: gaussian_kl(reference, Moments(jnp.zeros(1), v)).sum())(jnp.zeros(1))
  assert bool(jnp.isfinite(value)) and bool(jnp.isfinite(gradient).all())


def test_missing_layer_is_named() -> None:
  with pytest.raises(KwjaxError, match="block/bn"):
    bns_loss({"block/bn": moments([0.0], [1.0])}, {})
