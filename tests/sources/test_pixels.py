"""Algorithm 1 while a student learns from the images: the steps of the synthesis, many devices, resuming, the student's say."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.distillation import DistillConfig, distill, distill_with_history, initial_state, kl_divergence
from kwjax.errors import KwjaxError
from kwjax.sources import Pixels, PixelsState, RunState
from kwjax.synthesis import Evidence, SynthesisConfig, synthesis_step
from tests.sources.runs import Killed, flat, kill_at, newest_state, pair

KEY = jax.random.key(7)


def disagreement(evidence: Evidence) -> jax.Array:
  """Negative: the images are to show what the student has not learnt."""
  assert evidence.student_logits is not None
  return -kl_divergence(evidence.student_logits, evidence.logits, weights=evidence.weights)


SETTINGS = SynthesisConfig.for_network("bns+inception", 8).replace(steps=6, batch_size=7, init="uniform")
OBJECTIVE = dataclasses.replace(SETTINGS.objective, extra=(("disagreement", 0.1, disagreement),))
SOURCE = Pixels.of(pair()[1], SETTINGS.replace(objective=OBJECTIVE))
CONFIG = DistillConfig(5, batch_size=7, learning_rate=0.02, iq_weight=0.0, target_weight=0.1)
CONFIG = CONFIG.replace(log_every=1, checkpoint_every=2)


def state_of(workdir: pathlib.Path) -> RunState:
  return newest_state(workdir, RunState(SOURCE.init(KEY), initial_state(pair()[0], CONFIG)))


def test_a_run_makes_the_steps_of_algorithm_1_and_the_student_sees_them(tmp_path: pathlib.Path) -> None:
  student, teacher = pair()
  config = CONFIG.replace(steps=1, batch_norm="frozen")
  _, history = distill_with_history(student, teacher, SOURCE, config, key=KEY, workdir=tmp_path)
  begun, key = SOURCE.init(jax.random.fold_in(KEY, 3)), jax.random.fold_in(jax.random.fold_in(KEY, 2), 0)
  step = jax.jit(functools.partial(synthesis_step, config=SOURCE.config))
  pixels, metrics = step(begun.pixels, begun.labels, teacher, key, student=student)
  assert history[0]["source_jkl"] == pytest.approx(float(metrics["jkl"]), rel=1e-5)
  assert history[0]["source_disagreement"] == pytest.approx(float(metrics["disagreement"]), rel=1e-4)
  stored = state_of(tmp_path).source.pixels
  np.testing.assert_allclose(stored.images, pixels.images, atol=1e-4)
  logits = [network.apply(jnp.clip(stored.images, 0, 1)) for network in (student, teacher)]
  assert history[0]["kl"] == pytest.approx(float(kl_divergence(*logits)), rel=1e-4)


def test_the_student_has_a_say_in_the_images() -> None:
  student, teacher = pair()
  state = SOURCE.init(KEY)
  without = dataclasses.replace(SOURCE, config=SETTINGS)
  (one, first), (other, second) = (jax.jit(s.update)(state, KEY, teacher, student) for s in (SOURCE, without))
  assert "disagreement" in first
  assert "disagreement" not in second
  assert float(first["bns"]) == pytest.approx(float(second["bns"]), rel=1e-5)
  assert not np.allclose(one.pixels.images, other.pixels.images, atol=1e-3)


def test_eight_devices_do_what_one_does(tmp_path: pathlib.Path) -> None:
  student, teacher = pair()
  states = []
  for devices in (1, 8):
    config = CONFIG.replace(steps=2)
    distill(student, teacher, SOURCE, config, key=KEY, workdir=tmp_path / str(devices), devices=devices)
    states.append(state_of(tmp_path / str(devices)))
  assert states[1].source.pixels.images.shape == (7, 8, 8, 3), "no padding in a checkpoint"
  np.testing.assert_allclose(states[1].source.pixels.images, states[0].source.pixels.images, atol=1e-4)
  a, b = (flat(state.student.student.variables) for state in states)
  assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a - flat(student.variables))


def test_killed_and_started_again_pixels_and_student_have_the_same_bits(tmp_path: pathlib.Path) -> None:
  student, teacher = pair()
  run = lambda folder, **more: distill(
    student, teacher, SOURCE, CONFIG, key=KEY, workdir=tmp_path / folder, devices=3, **more
  )
  run("whole")
  with pytest.raises(Killed):
    run("killed", callback=kill_at(3))
  run("killed")
  whole, killed = state_of(tmp_path / "whole"), state_of(tmp_path / "killed")
  np.testing.assert_array_equal(flat(killed.source), flat(whole.source))
  np.testing.assert_array_equal(flat(killed.student), flat(whole.student))


def test_images_start_anew_when_they_are_done() -> None:
  state = SOURCE.init(KEY)
  assert SOURCE.refresh(state, KEY, None, None) is state
  done = PixelsState(state.pixels._replace(step=jnp.int32(6)), state.labels)
  other = SOURCE.refresh(done, jax.random.key(8), None, None)
  assert int(other.pixels.step) == 0
  assert not np.array_equal(other.pixels.images, state.pixels.images)
  assert SOURCE.phase_steps == 6


def test_batches_of_another_size_and_schemes_without_pixels_are_refused() -> None:
  student, teacher = pair()
  with pytest.raises(KwjaxError, match="7 images are optimized, and the student takes batches of 8"):
    distill(student, teacher, SOURCE, CONFIG.replace(batch_size=8), key=KEY)
  with pytest.raises(KwjaxError, match="optimizes no pixels"):
    Pixels.of(teacher, SynthesisConfig.preset("gaussian"))
