"""Losses against NumPy, PyTorch and closed forms of their gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.distillation import intermediate_loss, kl_divergence, smooth_l1, soft_cross_entropy, stage_losses
from kwjax.errors import KwjaxError


def logits(seed: int, shape: tuple[int, ...] = (7, 5)) -> jax.Array:
  return 3.0 * jax.random.normal(jax.random.key(seed), shape)


def softmax(x: np.ndarray) -> np.ndarray:
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_the_definition(temperature: float) -> None:
  s, t = np.asarray(logits(0), np.float64), np.asarray(logits(1), np.float64)
  p, q = softmax(t / temperature), softmax(s / temperature)
  expected = temperature**2 * np.mean(np.sum(p * np.log(p / q), -1))
  np.testing.assert_allclose(kl_divergence(logits(0), logits(1), temperature=temperature), expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_torchs(temperature: float) -> None:
  torch = pytest.importorskip("torch")
  s, t = (torch.tensor(np.array(logits(i))) / temperature for i in (0, 1))
  loss = torch.nn.functional.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean") * temperature**2
  np.testing.assert_allclose(kl_divergence(logits(0), logits(1), temperature=temperature), loss.item(), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_gradient_is_the_difference_of_probabilities(temperature: float) -> None:
  s, t = logits(0), logits(1)
  gradient = jax.grad(lambda x: kl_divergence(x, t, temperature=temperature))(s)
  expected = temperature / 7 * (softmax(np.asarray(s) / temperature) - softmax(np.asarray(t) / temperature))
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_kl_of_equal_and_of_extreme_logits() -> None:
  assert float(kl_divergence(logits(0), logits(0))) == 0.0
  far = jnp.asarray([[200.0, -200.0]])
  np.testing.assert_allclose(kl_divergence(-far, far), 400.0, rtol=1e-6)
  assert np.isfinite(jax.grad(lambda s: kl_divergence(s, far))(-far)).all()


def test_soft_cross_entropy_is_torchs_and_differs_from_kl_by_the_entropy() -> None:
  torch = pytest.importorskip("torch")
  s, t = (torch.tensor(np.array(logits(i))) for i in (0, 1))
  expected = torch.nn.functional.cross_entropy(s, t.softmax(-1)).item()
  np.testing.assert_allclose(soft_cross_entropy(logits(0), logits(1)), expected, rtol=1e-5)
  entropy = soft_cross_entropy(logits(1), logits(1))
  np.testing.assert_allclose(expected - entropy, kl_divergence(logits(0), logits(1)), rtol=1e-4)


def test_soft_cross_entropy_has_no_factor_of_the_temperature() -> None:
  s, t = (np.asarray(logits(i), np.float64) / 5.0 for i in (0, 1))
  expected = -np.mean(np.sum(softmax(t) * np.log(softmax(s)), -1))
  np.testing.assert_allclose(soft_cross_entropy(logits(0), logits(1), temperature=5.0), expected, rtol=1e-5)


def test_smooth_l1_on_both_sides_of_one() -> None:
  x = jnp.asarray([0.0, 0.5, -0.5, 1.0, 3.0, -3.0])
  np.testing.assert_allclose(smooth_l1(x, jnp.zeros(6)), (0 + 0.125 + 0.125 + 0.5 + 2.5 + 2.5) / 6, rtol=1e-6)


def test_intermediate_loss_is_torchs_summed_over_stages() -> None:
  torch = pytest.importorskip("torch")
  s = {"a": logits(0, (2, 4, 4, 3)), "b": logits(1, (2, 2, 2, 6))}
  t = {"a": logits(2, (2, 4, 4, 3)), "b": logits(3, (2, 2, 2, 6))}
  expected = sum(
    torch.nn.functional.smooth_l1_loss(torch.tensor(np.array(s[k])), torch.tensor(np.array(t[k]))).item() for k in s
  )
  np.testing.assert_allclose(intermediate_loss(s, t), expected, rtol=1e-5)
  assert list(stage_losses(s, t)) == ["a", "b"]
  for stage, value in stage_losses(s, t, reduction="sum").items():
    summed = torch.nn.functional.smooth_l1_loss(
      torch.tensor(np.array(s[stage])), torch.tensor(np.array(t[stage])), reduction="sum"
    )
    np.testing.assert_allclose(value, summed / len(s[stage]), rtol=1e-5)
  assert float(intermediate_loss({}, {})) == 0.0


@pytest.mark.parametrize("loss", [kl_divergence, soft_cross_entropy, smooth_l1])
def test_weights_are_those_of_a_weighted_average_over_the_batch(loss: Any) -> None:
  s, t, w = logits(0), logits(1), np.array([1.0, 0.0, 2.0, 0.0, 0.0, 0.5, 1.0], np.float32)
  one_by_one = [float(loss(s[i : i + 1], t[i : i + 1])) for i in range(7)]
  np.testing.assert_allclose(loss(s, t, weights=jnp.asarray(w)), np.average(one_by_one, weights=w), rtol=1e-5)
  gradient = jax.grad(lambda s: loss(s, t, weights=jnp.zeros(7)))(s)
  np.testing.assert_array_equal(gradient, 0.0)


def test_stages_with_patches_in_the_batch_take_the_weight_of_their_image() -> None:
  s, t = ({"a": logits(i, (3, 2, 2, 4)), "b": logits(i + 2, (6, 2, 2, 4))} for i in (0, 5))
  got = stage_losses(s, t, weights=jnp.array([1.0, 1.0, 0.0]))
  np.testing.assert_allclose(got["a"], smooth_l1(s["a"][:2], t["a"][:2]), rtol=1e-6)
  np.testing.assert_allclose(got["b"], smooth_l1(s["b"][:4], t["b"][:4]), rtol=1e-6)
  with pytest.raises(KwjaxError, match=r"stage a has shape \(3, 2, 2, 4\).* the 4 images"):
    intermediate_loss(s, t, weights=jnp.ones(4))


def test_stages_that_do_not_fit_are_named() -> None:
  with pytest.raises(KwjaxError, match=r"student stages \['a'\] are not the teacher's \['b'\]"):
    intermediate_loss({"a": jnp.zeros(3)}, {"b": jnp.zeros(3)})
  # NumPy would broadcast these two and give a number.
  with pytest.raises(KwjaxError, match=r"stage a has shape \(4, 3\) in the teacher and \(1, 3\)"):
    intermediate_loss({"a": jnp.zeros((1, 3))}, {"a": jnp.zeros((4, 3))})
