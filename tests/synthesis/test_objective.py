"""Terms against NumPy, SciPy-free closed forms and the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.batchnorm import Moments
from kwjax.errors import KwjaxError
from kwjax.synthesis import Evidence, Objective, evaluate_objective, inception_loss, smoothness_prior
from kwjax.synthesis.objective import TERMS, gaussian_kernel, total_variation


def evidence() -> Evidence:
  images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
  one, two = Moments(jnp.zeros(4), jnp.ones(4)), Moments(jnp.ones(2), jnp.ones(2))
  return Evidence(
    images=images,
    views=images,
    normalized=images * 2 - 1,
    logits=jax.random.normal(jax.random.key(1), (2, 5)),
    labels=jnp.array([3, 1]),
    reference={"input": one, "a": one, "b": two},
    measured={"input": Moments(one.mean + 1, one.var), "a": Moments(one.mean + 2, one.var), "b": two},
  )


def test_inception_loss() -> None:
  logits = jnp.array([[0.0, 2.0], [5.0, -1.0]])
  got = inception_loss(logits, jnp.array([1, 1]), scale=2.0)
  np.testing.assert_allclose(got, (np.exp(-1.0) + np.exp(0.5)) / 2, rtol=1e-6)


def test_smoothness_equals_a_two_dimensional_blur_with_reflected_borders() -> None:
  x = np.random.default_rng(0).uniform(size=(2, 9, 9, 3)).astype(np.float32)
  kernel = gaussian_kernel(5, 1.0)
  padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
  blurred = sum(kernel[i] * kernel[j] * padded[:, i : i + 9, j : j + 9] for i in range(5) for j in range(5))
  np.testing.assert_allclose(smoothness_prior(jnp.asarray(x)), np.mean((x - blurred) ** 2), rtol=1e-5)
  np.testing.assert_allclose(smoothness_prior(jnp.full((1, 8, 8, 3), 0.3)), 0.0, atol=1e-10)
  assert kernel.sum() == pytest.approx(1.0)
  assert kernel[2] / kernel[1] == pytest.approx(np.exp(0.5), rel=1e-5)


def test_total_variation_counts_four_directions() -> None:
  x = np.random.default_rng(0).uniform(size=(2, 5, 6, 3)).astype(np.float32)
  norms = [
    np.linalg.norm(x[:, :, 1:] - x[:, :, :-1]),
    np.linalg.norm(x[:, 1:] - x[:, :-1]),
    np.linalg.norm(x[:, 1:, 1:] - x[:, :-1, :-1]),
    np.linalg.norm(x[:, 1:, :-1] - x[:, :-1, 1:]),
  ]
  np.testing.assert_allclose(total_variation(jnp.asarray(x)), sum(norms), rtol=1e-5)
  assert bool(jnp.isfinite(jax.grad(total_variation)(jnp.zeros((1, 4, 4, 3)))).all())


def test_terms_of_a_padded_batch_are_those_of_its_images() -> None:
  e = evidence()
  noise = jax.random.uniform(jax.random.key(5), (2, 8, 8, 3))
  padded = e._replace(
    images=jnp.concatenate([e.images, noise[:1]]),
    views=jnp.concatenate([e.views, noise[:1]]),
    normalized=jnp.concatenate([e.normalized, noise[:1]]),
    logits=jnp.concatenate([e.logits, jnp.full((1, 5), -3.0)]),
    labels=jnp.append(e.labels, 4),
    weights=jnp.array([1.0, 1.0, 0.0]),
  )
  objective = Objective(monitor=tuple(TERMS), extra=(("count", 1.0, lambda e: e.image_weights.sum()),))
  _, expected = evaluate_objective(e, Objective(monitor=tuple(TERMS)))
  _, terms = evaluate_objective(padded, objective)
  assert float(terms.pop("count")) == 2.0
  assert set(terms) == set(expected) == set(TERMS)
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=1e-6, err_msg=name)


def test_views_of_an_image_have_its_weight() -> None:
  e = evidence()
  e = e._replace(views=jnp.repeat(e.views, 3, axis=0), weights=jnp.array([1.0, 1, 1, 0, 0, 0]))
  np.testing.assert_array_equal(e.image_weights, [1.0, 0.0])
  assert evidence().image_weights is None


def test_own_terms_are_averaged_by_the_weight_of_each_device() -> None:
  """Devices of weight 2, 1 and 0 whose term is 10, 4 and 7: (2 * 10 + 1 * 4) / 3."""
  objective = Objective(bns=0.0, extra=(("own", 1.0, lambda e: e.images.mean()),))
  values, weights = jnp.array([10.0, 4.0, 7.0]), jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])

  def total(value: jax.Array, weights: jax.Array) -> jax.Array:
    e = evidence()
    e = e._replace(images=jnp.full_like(e.images, value), weights=weights, axis_name="d")
    return evaluate_objective(e, objective)[0]

  np.testing.assert_allclose(jax.vmap(total, axis_name="d")(values, weights), 8.0, rtol=1e-6)


def test_sum_of_weighted_terms_and_monitored_ones() -> None:
  e = evidence()
  objective = Objective(
    bns=2.0, inception=0.5, monitor=("smoothness",), extra=(("mean", 3.0, lambda e: e.images.mean()),)
  )
  loss, terms = evaluate_objective(e, objective)
  assert set(terms) == {"bns", "inception", "smoothness", "mean"}
  np.testing.assert_allclose(terms["bns"], (0.5 + 2.0 + 0.0) / 3, rtol=1e-5)
  np.testing.assert_allclose(loss, 2 * terms["bns"] + 0.5 * terms["inception"] + 3 * terms["mean"], rtol=1e-6)


def test_deep_inversion_weights_the_first_layer_and_sums_layers() -> None:
  objective = Objective(divergence="moment_l2", layer_sum=True, first_layer=10.0, include_input=False)
  e = evidence()
  e = e._replace(reference={k: v for k, v in e.reference.items() if k != "input"})
  np.testing.assert_allclose(evaluate_objective(e, objective)[1]["bns"], 10 * 4.0, rtol=1e-5)


@pytest.mark.parametrize("options", [{"divergence": "kl2"}, {"monitor": ("nothing",)}, {"smoothness_size": 4}])
def test_impossible_settings_are_refused(options: dict) -> None:
  with pytest.raises(KwjaxError):
    Objective(**options)
