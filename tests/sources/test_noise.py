"""Noise that is drawn anew at every step: which noise, over restarts, devices and settings."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from kwjax.distillation import DistillConfig, distill, distill_with_history
from kwjax.errors import CheckpointError, KwjaxError
from kwjax.sources import FreshNoise
from kwjax.synthesis import dead_leaves, gaussian_images
from tests.networks import tiny_network
from tests.sources.runs import Killed, flat, kill_at, pair

KEY = jax.random.key(5)
SHAPE, MEAN, STD = (8, 8, 3), (0.5, 0.4, 0.45), (0.25, 0.3, 0.2)
CONFIG = DistillConfig(5, batch_size=8, learning_rate=0.01, iq_weight=0.0, current=(".*",))
CONFIG = CONFIG.replace(log_every=1, checkpoint_every=2)
NOISE = {
  "gaussian": FreshNoise.gaussian(SHAPE, MEAN, STD),
  "dead_leaves": FreshNoise.dead_leaves(SHAPE, radii=(0.1, 0.9)),
}
ONE = {
  "gaussian": lambda key: gaussian_images(key, 1, SHAPE, MEAN, STD),
  "dead_leaves": lambda key: dead_leaves(key, 1, SHAPE, radii=(0.1, 0.9)),
}


@pytest.mark.parametrize("name", NOISE)
def test_each_image_is_that_of_its_own_key(name: str) -> None:
  draw = jax.jit(lambda key: NOISE[name].draw((), key, 8).images)
  drawn = [np.asarray(draw(jax.random.fold_in(KEY, step))) for step in (0, 1, 0)]
  assert len(np.unique(np.concatenate(drawn).reshape(24, -1), axis=0)) == 16
  np.testing.assert_array_equal(drawn[0], drawn[2])
  keys = jax.random.split(jax.random.fold_in(KEY, 0), (8, 2))[:, 0]
  for i in (0, 5):
    np.testing.assert_allclose(drawn[0][i], ONE[name](keys[i])[0], atol=1e-6)


def test_killed_and_started_again_gives_the_same_bits(tmp_path: pathlib.Path) -> None:
  student, teacher = pair()
  whole, history = distill_with_history(student, teacher, NOISE["gaussian"], CONFIG, key=KEY)
  assert len({row["kl"] for row in history}) == len(history)
  with pytest.raises(Killed):
    distill(student, teacher, NOISE["gaussian"], CONFIG, key=KEY, workdir=tmp_path, callback=kill_at(3))
  resumed, again = distill_with_history(student, teacher, NOISE["gaussian"], CONFIG, key=KEY, workdir=tmp_path)
  np.testing.assert_array_equal(flat(resumed), flat(whole))
  assert again == history
  clipped = FreshNoise.gaussian(SHAPE, MEAN, STD, clip=True)
  with pytest.raises(CheckpointError, match=r"source\.noise\.clip is [Ff]alse there and [Tt]rue now"):
    distill(student, teacher, clipped, CONFIG, key=KEY, workdir=tmp_path)


def test_two_devices_see_the_noise_of_one() -> None:
  student, teacher = pair()
  config = CONFIG.replace(batch_size=7, steps=2)  # one image of padding
  # Not of dead leaves: two programs may differ in the last digit, which decides on a pixel at the edge of a leaf.
  one, two = (distill(student, teacher, NOISE["gaussian"], config, key=KEY, devices=n) for n in (1, 2))
  moved = np.linalg.norm(flat(one.variables) - flat(student.variables))
  assert np.linalg.norm(flat(one.variables) - flat(two.variables)) <= 1e-4 * moved


def test_what_does_not_go_with_it_is_refused() -> None:
  student, teacher = pair()
  config = CONFIG.replace(augment=lambda key, images: images)
  with pytest.raises(KwjaxError, match="FreshNoise says itself how its images are drawn"):
    distill(student, teacher, NOISE["gaussian"], config, key=KEY)
  with pytest.raises(KwjaxError, match=r"tiny takes images of shape \(8, 8, 3\), and FreshNoise has \(4, 4, 3\)"):
    distill(student, teacher, FreshNoise.dead_leaves((4, 4, 3)), CONFIG, key=KEY)


def test_equal_settings_are_equal_sources() -> None:
  assert FreshNoise.dead_leaves(SHAPE) == FreshNoise.dead_leaves(SHAPE, shapes="mixed")
  same = [FreshNoise.gaussian(SHAPE, mean, STD) for mean in (np.float32(MEAN), list(np.float32(MEAN)))]
  assert hash(same[0]) == hash(same[1])
  assert FreshNoise.gaussian(SHAPE, MEAN, STD) != FreshNoise.gaussian(SHAPE, MEAN, STD, clip=True)
  settings = FreshNoise.dead_leaves(SHAPE, shapes=("circle", "square")).to_json()
  assert settings["noise"]["shapes"] == ["circle", "square"]
  with pytest.raises(KwjaxError, match="unknown shape of leaves 'star'"):
    FreshNoise.dead_leaves(SHAPE, shapes="star")
  with pytest.raises(KwjaxError, match="a mean and a positive std a channel"):
    FreshNoise.gaussian(SHAPE, MEAN, (0.1, 0.0, 0.1))
  with pytest.raises(KwjaxError, match="a mean and a positive std a channel"):
    FreshNoise.gaussian(SHAPE, (0.5,), (0.1,))


def test_a_networks_own_space() -> None:
  network = tiny_network()
  noise = FreshNoise.gaussian(network.image_shape, network.input_mean, network.input_std)
  x = (noise.draw((), KEY, 256).images - np.float32(network.input_mean)) / np.float32(network.input_std)
  np.testing.assert_allclose((x.mean(), x.std()), (0.0, 1.0), atol=0.01)
