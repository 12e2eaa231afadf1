"""Sets that are there already: targets beside the images, draws outside a run, what a run refuses to mix up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.distillation import DistillConfig, distill, distill_with_history
from kwjax.errors import DataError, KwjaxError
from kwjax.sources import FixedSet, Mixup, planner
from kwjax.sources.fixed import _Rows
from tests.sources.runs import flat, pair

KEY = jax.random.key(2)
IMAGES = np.random.default_rng(0).random((12, 8, 8, 3), dtype=np.float32)
CLASSES = np.arange(12) % 5
SOFT = np.random.default_rng(1).dirichlet(np.ones(5), 12).astype(np.float32)


@pytest.mark.parametrize(("targets", "expected"), [(CLASSES, np.eye(5)[CLASSES]), (SOFT, SOFT)])
def test_targets_are_mixed_as_their_images(targets: np.ndarray, expected: np.ndarray) -> None:
  source = FixedSet(IMAGES, targets, num_classes=5, mixup=Mixup(lam=0.3))
  plan = planner(KEY, 12, 6, mixup=source.mixup)(1)
  batch = source.assemble(_Rows(plan, None, None))
  mine, theirs = plan.chosen, np.asarray(plan.mixing.partner)
  np.testing.assert_allclose(batch.images, 0.3 * IMAGES[mine] + 0.7 * IMAGES[theirs], rtol=1e-5)
  np.testing.assert_allclose(batch.targets, 0.3 * expected[mine] + 0.7 * expected[theirs], rtol=1e-5)


def test_a_class_of_minus_one_is_no_target() -> None:
  batch = FixedSet(IMAGES, np.full(12, -1), num_classes=5).draw((), KEY, 4)
  np.testing.assert_array_equal(batch.targets, np.zeros((4, 5)))


def test_a_draw_outside_a_run_is_pure_and_of_the_set() -> None:
  source = FixedSet((IMAGES * 255).astype(np.uint8), SOFT)
  draw = jax.jit(lambda source, key: source.draw((), key, 32))
  one, again, other = (draw(source, key) for key in (KEY, KEY, jax.random.key(3)))
  np.testing.assert_array_equal(one.images, again.images)
  assert not np.array_equal(one.images, other.images)
  found = [np.flatnonzero(np.abs(image - source.images / 255).max((1, 2, 3)) < 1e-6) for image in one.images]
  assert all(len(matches) == 1 for matches in found)
  np.testing.assert_allclose(one.targets, SOFT[np.concatenate(found)], rtol=1e-6)


def test_targets_on_the_host_teach_what_resident_ones_teach() -> None:
  student, teacher = pair()
  config = DistillConfig(3, batch_size=5, learning_rate=0.02, iq_weight=0.0, target_weight=1.0, log_every=1)
  source = FixedSet(IMAGES, CLASSES, num_classes=5, mixup=Mixup())
  resident, history = distill_with_history(student, teacher, source, config, key=KEY, devices=2)
  host = FixedSet(IMAGES, CLASSES, num_classes=5, mixup=Mixup(), resident_bytes=0)
  streamed = distill(student, teacher, host, config, key=KEY, devices=2)
  np.testing.assert_allclose(flat(streamed), flat(resident), rtol=1e-5, atol=1e-6)
  assert history[0]["target"] > 0


def test_what_does_not_fit_is_refused() -> None:
  student, teacher = pair()
  with pytest.raises(KwjaxError, match=r"shape \(n, h, w, c\), found \(12, 8, 8\)"):
    FixedSet(IMAGES[..., 0])
  with pytest.raises(DataError, match="12 images have 3 targets"):
    FixedSet(IMAGES, SOFT[:3])
  with pytest.raises(KwjaxError, match="need num_classes"):
    FixedSet(IMAGES, CLASSES)
  with pytest.raises(KwjaxError, match="FixedSet says itself how its images are drawn"):
    distill(student, teacher, FixedSet(IMAGES), DistillConfig(1, mixup=Mixup()), key=KEY)


def test_the_devices_hold_no_set_that_is_too_large() -> None:
  source = FixedSet(jnp.asarray(IMAGES), resident_bytes=2 * IMAGES.nbytes)
  assert [len(jax.tree.leaves(source.on_devices(count))) for count in (1, 2, 3)] == [1, 1, 0]
  assert source.on_devices(3).to_json() == source.to_json()
