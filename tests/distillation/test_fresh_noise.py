"""Noise that is drawn anew at every step: which noise, over restarts, devices and settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from kwjax.distillation import DistillConfig, assemble, distill, distill_with_history, planner
from kwjax.errors import CheckpointError, KwjaxError
from kwjax.network import Network
from kwjax.synthesis import fresh_dead_leaves, fresh_gaussian

KEY = jax.random.key(5)
CONFIG = DistillConfig(5, batch_size=8, learning_rate=0.01, iq_weight=0.0, current=(".*",))
CONFIG = CONFIG.replace(log_every=1, checkpoint_every=2)
NOISE = {
  "gaussian": fresh_gaussian((0.5, 0.4, 0.45), (0.25, 0.3, 0.2)),
  "dead_leaves": fresh_dead_leaves(radii=(0.1, 1.0)),
}


def flat(tree: Any) -> np.ndarray:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", NOISE)
def test_every_image_of_every_step_is_another_one(name: str) -> None:
  config = CONFIG.replace(augment=NOISE[name])
  place, plan = np.zeros((8, 8, 8, 3), np.uint8), planner(KEY, 8, config)
  draw = jax.jit(lambda images, plan: assemble(images, None, plan, config.augment))
  drawn = np.concatenate([draw(place, plan(step)) for step in (0, 1, 0)])
  assert len(np.unique(drawn.reshape(24, -1), axis=0)) == 16
  np.testing.assert_array_equal(drawn[:8], drawn[16:])


def test_killed_and_started_again_gives_the_same_bits(student: Network, teacher: Network, tmp_path: Any) -> None:
  class Killed(Exception):
    pass

  def kill(step: int, metrics: dict[str, float], network: Any) -> None:
    if step == 3:
      raise Killed

  noise = NOISE["gaussian"]
  whole, history = distill_with_history(student, teacher, noise, CONFIG, key=KEY)
  assert len({row["kl"] for row in history}) == len(history)
  with pytest.raises(Killed):
    distill(student, teacher, noise, CONFIG, key=KEY, workdir=tmp_path, callback=kill)
  resumed, again = distill_with_history(student, teacher, noise, CONFIG, key=KEY, workdir=tmp_path)
  np.testing.assert_array_equal(flat(resumed), flat(whole))
  assert again == history
  with pytest.raises(CheckpointError, match=r"config\.augment"):
    distill(student, teacher, dataclasses.replace(noise, clip=True), CONFIG, key=KEY, workdir=tmp_path)


def test_two_devices_see_the_noise_of_one(student: Network, teacher: Network) -> None:
  config = CONFIG.replace(batch_size=7, steps=2)  # one image of padding
  one, two = (distill(student, teacher, NOISE["dead_leaves"], config, key=KEY, devices=n) for n in (1, 2))
  moved = np.linalg.norm(flat(one.variables) - flat(student.variables))
  assert np.linalg.norm(flat(one.variables) - flat(two.variables)) <= 1e-4 * moved


def test_an_augmentation_beside_it_is_refused(student: Network, teacher: Network) -> None:
  config = CONFIG.replace(augment=NOISE["gaussian"])
  with pytest.raises(KwjaxError, match="take the place of augment"):
    distill(student, teacher, NOISE["gaussian"], config, key=KEY)
