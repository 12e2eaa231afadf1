"""Mixing: the closed form, both readings of the mix rate, and the distribution of partners."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.errors import KwjaxError
from kwjax.sources import Mixup, draw_mixing, mix


def test_mix_is_the_weighted_sum() -> None:
  x, y = np.random.default_rng(0).random((2, 3, 4, 4, 3), np.float32)
  lam = np.asarray([1.0, 0.25, 0.0], np.float32)
  mixed = mix(jnp.asarray(x), jnp.asarray(y), jnp.asarray(lam))
  for i in range(3):
    np.testing.assert_allclose(mixed[i], lam[i] * x[i] + (1 - lam[i]) * y[i], rtol=1e-6)
  np.testing.assert_array_equal(mixed[0], x[0])


def test_constant_weight() -> None:
  mixing = draw_mixing(jax.random.key(0), 1000, 7, Mixup(lam=0.3))
  np.testing.assert_allclose(mixing.lam, 0.3)
  assert set(np.asarray(mixing.partner).tolist()) == set(range(7))


def test_probability() -> None:
  lam = np.asarray(draw_mixing(jax.random.key(0), 4000, 7, Mixup(lam=0.3, probability=0.5)).lam)
  assert set(np.unique(lam).tolist()) == {np.float32(0.3).item(), 1.0}
  # Five standard deviations of a binomial share.
  assert abs(np.mean(lam == 1.0) - 0.5) < 5 * 0.5 / np.sqrt(4000)
  assert (np.asarray(draw_mixing(jax.random.key(0), 50, 7, Mixup(probability=0.0)).lam) == 1.0).all()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_beta_weights(alpha: float) -> None:
  lam = np.asarray(draw_mixing(jax.random.key(1), 20_000, 7, Mixup(alpha=alpha)).lam, np.float64)
  variance = 1 / (4 * (2 * alpha + 1))
  assert abs(lam.mean() - 0.5) < 5 * np.sqrt(variance / 20_000)
  np.testing.assert_allclose(lam.var(), variance, rtol=0.05)


@pytest.mark.parametrize("settings", [{"lam": 1.5}, {"lam": float("nan")}, {"probability": -0.1}, {"alpha": 0.0}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
  with pytest.raises(KwjaxError, match="mixup needs"):
    Mixup(**settings)
