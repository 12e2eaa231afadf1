"""A source that learns beside the student: both in one state, in every checkpoint, on any number of devices."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.distillation import DistillConfig, distill, distill_with_history, initial_state
from kwjax.errors import CheckpointError, KwjaxError, NonFiniteError
from kwjax.sources import Batch, RunState, Source
from tests.sources.linear_generator import GeneratorState, LinearGenerator
from tests.sources.runs import Killed, flat, kill_at, newest_state, pair

KEY = jax.random.key(11)
SHAPE = (8, 8, 3)
CONFIG = DistillConfig(6, batch_size=7, learning_rate=0.02, iq_weight=0.0, target_weight=0.5)
CONFIG = CONFIG.replace(log_every=1, checkpoint_every=2)
SOURCE = LinearGenerator(SHAPE, num_classes=5, batch_size=7)


def run(workdir: pathlib.Path, devices: int, source: Any = SOURCE, **changes: Any) -> tuple[RunState, list[Any]]:
  """Last state and history."""
  student, teacher = pair()
  config = CONFIG.replace(**changes)
  _, history = distill_with_history(student, teacher, source, config, key=KEY, workdir=workdir, devices=devices)
  return newest_state(workdir, RunState(source.init(KEY), initial_state(student, config))), history


@pytest.mark.parametrize("devices", [1, 3])
def test_killed_and_started_again_source_and_student_have_the_same_bits(tmp_path: pathlib.Path, devices: int) -> None:
  student, teacher = pair()
  whole, history = run(tmp_path / "whole", devices)
  # Before the first checkpoint, and between two.
  for done in (1, 5):
    with pytest.raises(Killed):
      distill(student, teacher, SOURCE, CONFIG, key=KEY, workdir=tmp_path, devices=devices, callback=kill_at(done))
  resumed, again = run(tmp_path, devices)
  assert again == history
  np.testing.assert_array_equal(flat(resumed.source), flat(whole.source))
  np.testing.assert_array_equal(flat(resumed.student), flat(whole.student))
  begun = SOURCE.init(jax.random.fold_in(KEY, 3))
  assert np.abs(np.asarray(whole.source.weights - begun.weights)).max() > 0.1, "it has learnt"
  with pytest.raises(CheckpointError, match=r"source\.rate is 0\.05 there and 0\.1 now"):
    run(tmp_path, devices, dataclasses.replace(SOURCE, rate=0.1))


def test_eight_devices_do_what_one_does(tmp_path: pathlib.Path) -> None:
  (one, first), (eight, second) = (run(tmp_path / str(devices), devices, steps=3) for devices in (1, 8))
  for a, b in zip(first, second, strict=True):
    assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
  student, _ = pair()
  start = RunState(SOURCE.init(jax.random.fold_in(KEY, 3)).weights, student.variables)
  ends = [RunState(state.source.weights, state.student.student.variables) for state in (one, eight)]
  for part in ("source", "student"):
    a, b, before = (flat(getattr(state, part)) for state in (*ends, start))
    assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a - before), part


def test_the_adversarial_gradient_drives_the_networks_apart() -> None:
  student, teacher = pair()
  source = dataclasses.replace(SOURCE, adversarial=100.0)
  state, step = source.init(KEY), jax.jit(source.update)
  apart = []
  for _ in range(25):
    state, metrics = step(state, KEY, teacher, student)
    apart.append(float(metrics["disagreement"]))
  assert apart[-1] > 1.5 * apart[0]


def test_a_source_may_be_updated_every_few_steps(tmp_path: pathlib.Path) -> None:
  state, history = run(tmp_path, 1, dataclasses.replace(SOURCE, update_every=3))
  assert int(state.source.optimizer[0].count) == 2
  assert ["source_loss" in row for row in history] == [False, False, True] * 2


def test_targets_are_the_cross_entropy_of_the_formula() -> None:
  student, teacher = pair()
  config = CONFIG.replace(steps=1, kl_weight=0.0, target_weight=2.0, batch_norm="frozen")
  _, history = distill_with_history(student, teacher, SOURCE, config, key=KEY)
  state, _ = SOURCE.update(SOURCE.init(jax.random.fold_in(KEY, 3)), key := _step_key(0), teacher, student)
  batch = SOURCE.draw(state, key, 7)
  log_p = np.asarray(jax.nn.log_softmax(student.apply(batch.images)))
  expected = -float(np.mean(np.sum(np.asarray(batch.targets) * log_p, axis=1)))
  assert history[0]["target"] == pytest.approx(expected, rel=1e-4)
  assert history[0]["loss"] == pytest.approx(2.0 * expected, rel=1e-4)


def _step_key(step: int) -> jax.Array:
  return jax.random.fold_in(jax.random.fold_in(KEY, 2), step)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Phases(Source[jax.Array]):
  """Grey images of a value that each phase sets anew from the one before and its key, and no targets."""

  image_shape: tuple[int, int, int] = SHAPE
  phase_steps: int = 2
  drawn_shape: tuple[int, ...] = SHAPE

  def init(self, key: jax.Array) -> jax.Array:
    return jnp.zeros(())

  def draw(self, state: jax.Array, key: jax.Array, n: int, axis_name: str | None = None) -> Batch:
    return Batch(jnp.full((n, *self.drawn_shape), state))

  def refresh(self, state: jax.Array, key: jax.Array, teacher: Any, student: Any) -> jax.Array:
    del teacher
    return (
      0.5 * jnp.asarray(state)
      + 0.5 * jax.random.uniform(key)
      + 0.0 * jnp.sum(student.variables["params"]["fc"]["bias"])
    )


def test_a_source_is_refreshed_at_the_start_of_each_phase_once(tmp_path: pathlib.Path) -> None:
  student, teacher = pair()
  config = CONFIG.replace(steps=5, target_weight=0.0)
  expected = 0.0
  for step in (0, 2, 4):
    expected = 0.5 * expected + 0.5 * float(jax.random.uniform(jax.random.fold_in(jax.random.fold_in(KEY, 4), step)))
  # Killed where the checkpoint is the end of a phase: the phase behind it begins again, from the same state.
  with pytest.raises(Killed):
    distill(student, teacher, Phases(), config, key=KEY, workdir=tmp_path, callback=kill_at(3))
  distill(student, teacher, Phases(), config, key=KEY, workdir=tmp_path)
  state = newest_state(tmp_path, RunState(jnp.zeros(()), initial_state(student, config)))
  assert float(state.source) == pytest.approx(expected, rel=1e-6)


@dataclasses.dataclass(frozen=True)
class Unregistered(Phases):
  """What JAX does not know."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Diverging(Phases):
  """An update whose loss is NaN from the third step on."""

  phase_steps: int | None = None  # type: ignore[assignment]

  def update(
    self, state: jax.Array, key: jax.Array, teacher: Any, student: Any, axis_name: str | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    return state + 1, {"loss": jnp.where(state >= 2, jnp.nan, state)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Colours(Source[jax.Array]):
  """Images of one colour each, which start from arrays of the settings and drift."""

  start: jax.Array
  image_shape: tuple[int, int, int] = dataclasses.field(default=SHAPE, metadata={"static": True})

  def init(self, key: jax.Array) -> jax.Array:
    return self.start

  def draw(self, state: jax.Array, key: jax.Array, n: int, axis_name: str | None = None) -> Batch:
    return Batch(jnp.broadcast_to(0.5 * (state + self.start)[:, None, None, None], (n, *SHAPE)))

  def update(
    self, state: jax.Array, key: jax.Array, teacher: Any, student: Any, axis_name: str | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    return 0.5 * state, {}


def test_arrays_of_the_settings_outlast_a_state_that_began_as_they_are(tmp_path: pathlib.Path) -> None:
  source = Colours(jnp.linspace(0.0, 1.0, 7))
  state, _ = run(tmp_path, 1, source, steps=2, target_weight=0.0)
  np.testing.assert_allclose(state.source, source.start / 4)
  with pytest.raises(CheckpointError, match=r"source\.start is "):
    run(tmp_path, 1, Colours(jnp.linspace(0.0, 0.9, 7)), steps=2, target_weight=0.0)


def test_what_cannot_work_is_one_sentence() -> None:
  student, teacher = pair()
  config = CONFIG.replace(target_weight=0.0)
  for source, settings, text in (
    (Unregistered(), config, "Unregistered is no pytree: decorate it with jax.tree_util.register_static"),
    (Phases(drawn_shape=(4, 8, 3)), config, r"Phases drew images of shape \(7, 4, 8, 3\) where \(7, 8, 8, 3\) belong"),
    (Phases(), CONFIG, "target_weight is not 0, and the images come without targets"),
  ):
    with pytest.raises(KwjaxError, match=text):
      distill(student, teacher, source, settings, key=KEY)
  with pytest.raises(NonFiniteError, match="the loss of the source of the images became NaN or infinite at step 2"):
    distill(student, teacher, Diverging(), config.replace(log_every=4), key=KEY)


def test_the_state_is_a_pytree_of_both() -> None:
  student, _ = pair()
  state = RunState(SOURCE.init(KEY), initial_state(student, CONFIG))
  assert isinstance(state.source, GeneratorState)
  assert int(state.step) == 0
  assert int(state.bad_step) == -1
