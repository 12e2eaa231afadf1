"""Batches: nothing dropped or seen twice in an epoch, pure in key and step, each image with its own randomness."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.sources import Mixup, assemble, planner
from kwjax.sources.plan import gather, take


@pytest.fixture
def images() -> np.ndarray:
  """48 images f32 in [0, 1]."""
  return np.asarray(jax.random.uniform(jax.random.key(3), (48, 8, 8, 3)))


def noise(key: jax.Array, images: jax.Array) -> jax.Array:
  return images + jax.random.normal(key, images.shape)


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (10, 10), (7, 3), (3, 8), (1, 5)])
def test_every_epoch_is_a_permutation(num_images: int, batch_size: int) -> None:
  plan = planner(jax.random.key(0), num_images, batch_size)
  batches = [plan(step).chosen for step in range(20)]
  assert all(batch.shape == (batch_size,) for batch in batches)
  stream = np.concatenate(batches)
  epochs = stream[: len(stream) // num_images * num_images].reshape(-1, num_images)
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_images), (len(epochs), 1)))
  if num_images >= 7:
    assert not (epochs == epochs[0]).all(), "epochs must differ in their order"


def test_a_plan_depends_on_key_and_step_alone() -> None:
  options = {"mixup": Mixup(alpha=0.5), "augments": True}
  forward, again = (planner(jax.random.key(0), 10, 6, **options) for _ in range(2))
  plans = [forward(step) for step in range(6)]
  for step in (5, 0, 3):
    plan = again(step)
    np.testing.assert_array_equal(plan.chosen, plans[step].chosen)
    np.testing.assert_array_equal(plan.mixing.lam, plans[step].mixing.lam)
    np.testing.assert_array_equal(plan.mixing.partner, plans[step].mixing.partner)
    np.testing.assert_array_equal(jax.random.key_data(plan.keys), jax.random.key_data(plans[step].keys))
  other = planner(jax.random.key(1), 10, 6, **options)(0)
  assert not np.array_equal(other.mixing.lam, plans[0].mixing.lam)
  assert not np.array_equal(plans[1].mixing.lam, plans[0].mixing.lam)


def test_assembled_batch_is_the_formula(images: np.ndarray) -> None:
  plan = planner(jax.random.key(2), len(images), 6, mixup=Mixup(lam=0.3))(1)
  batch = assemble(*map(jnp.asarray, gather(images, plan)), plan, None)
  for i in range(6):
    expected = 0.3 * images[plan.chosen[i]] + 0.7 * images[plan.mixing.partner[i]]
    np.testing.assert_allclose(batch[i], expected, rtol=1e-6)


def test_eight_bit_images_are_brought_to_the_unit_interval() -> None:
  stored = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), np.uint8)
  plan = planner(jax.random.key(2), 9, 9)(0)
  batch = assemble(jnp.asarray(gather(stored, plan)[0]), None, plan, None)
  np.testing.assert_allclose(batch, stored[plan.chosen] / 255.0, rtol=1e-6)


def test_augmentation_of_an_image_does_not_depend_on_the_batch_around_it(images: np.ndarray) -> None:
  plan = planner(jax.random.key(2), len(images), 8, augments=True)(0)
  x = jnp.asarray(gather(images, plan)[0])
  whole = assemble(x, None, plan, noise)
  half = assemble(x[4:], None, plan._replace(chosen=plan.chosen[4:], keys=plan.keys[4:]), noise)
  np.testing.assert_array_equal(whole[4:], half)
  change = np.asarray(whole - x).reshape(8, -1)
  assert len({row.tobytes() for row in change}) == 8, "each image has its own noise"


def test_image_and_partner_are_augmented_apart(images: np.ndarray) -> None:
  plan = planner(jax.random.key(2), len(images), 4, mixup=Mixup(lam=0.5), augments=True)(0)
  same = jnp.zeros((4, *images.shape[1:]))
  mixed = assemble(same, same, plan, noise)
  # Two independent draws of variance 1, averaged.
  np.testing.assert_allclose(np.var(mixed), 0.5, rtol=0.2)


def test_rows_of_a_plan() -> None:
  plan = planner(jax.random.key(2), 9, 5, mixup=Mixup(alpha=0.5), augments=True)(0)
  index = np.array([3, 4, 4, 4, 4])
  part = take(plan, index)
  np.testing.assert_array_equal(part.chosen, plan.chosen[index])
  np.testing.assert_array_equal(part.mixing.lam, np.asarray(plan.mixing.lam)[index])
  np.testing.assert_array_equal(jax.random.key_data(part.keys), jax.random.key_data(plan.keys)[index])
