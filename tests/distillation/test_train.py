"""Whole runs: learning, resuming to the bit, many devices, stopping, refusals."""

from __future__ import annotations

import os
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.distillation import DistillConfig, Mixup, distill, distill_with_history, kl_divergence
from kwjax.errors import CheckpointError, DataError, KwjaxError, NonFiniteError
from kwjax.network import Network
from kwjax.quantization import QuantizedNetwork, QuantRules, calibrate, quantize

KEY = jax.random.key(11)


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
  return jnp.where(jax.random.bernoulli(key), images[:, :, ::-1], images)


CONFIG = DistillConfig(
  9, batch_size=16, learning_rate=0.02, warmup_steps=2, mixup=Mixup(alpha=1.0, probability=0.5), augment=flip
).replace(log_every=2, checkpoint_every=3)


def flat(tree: Any) -> np.ndarray:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def make_quantized(network: Network, images: np.ndarray) -> QuantizedNetwork:
  rules = QuantRules.parse("4w4a", first_last="8w8a")
  return quantize(network, rules, calibrate(network, images, rules, key=jax.random.key(0), steps=2, batch_size=16))


class Killed(Exception):
  pass


def kill_at(done: int) -> Any:
  def callback(step: int, metrics: dict[str, float], student: Any) -> None:
    if step >= done:
      raise Killed

  return callback


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_perturbed_student_gets_closer(student: Network, teacher: Network, images: np.ndarray, batch_norm: str) -> None:
  config = DistillConfig(40, batch_size=16, learning_rate=0.02, batch_norm=batch_norm, mixup=Mixup())
  trained, history = distill_with_history(student, teacher, images, config, key=KEY)
  before, after = (float(kl_divergence(n.apply(images), teacher.apply(images))) for n in (student, trained))
  assert after < 0.5 * before
  assert [row["step"] for row in history] == [10, 20, 30, 40]
  assert trained.name == student.name
  assert trained.module == student.module
  stats = flat(student.variables["batch_stats"]), flat(trained.variables["batch_stats"])
  assert np.array_equal(*stats) == (batch_norm == "frozen")


def test_quantized_student_gets_closer_and_keeps_its_ranges(teacher: Network, images: np.ndarray) -> None:
  rules = QuantRules.parse("2w4a", first_last="4w4a")
  ranges = calibrate(teacher, images, rules, key=jax.random.key(0), steps=2, batch_size=16)
  student = quantize(teacher, rules, ranges)
  config = DistillConfig(60, batch_size=16, learning_rate=0.01, iq_weight=0.0)
  trained = distill(student, teacher, images, config, key=KEY)
  assert isinstance(trained, QuantizedNetwork)
  before, after = (float(kl_divergence(n.apply(images), teacher.apply(images))) for n in (student, trained))
  assert after < 0.6 * before
  np.testing.assert_array_equal(flat(trained.ranges), flat(student.ranges))


def test_equal_float_student_with_frozen_statistics_stays(teacher: Network, images: np.ndarray) -> None:
  config = CONFIG.replace(batch_norm="frozen")
  trained, history = distill_with_history(teacher, teacher, images, config, key=KEY)
  assert max(row["loss"] for row in history) < 1e-6
  np.testing.assert_allclose(flat(trained.variables), flat(teacher.variables), atol=1e-6)


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_killed_and_started_again_gives_the_same_bits(
  student: Network, teacher: Network, images: np.ndarray, tmp_path: Any, kind: str
) -> None:
  network = make_quantized(student, images) if kind == "quantized" else student
  whole, history = distill_with_history(network, teacher, images, CONFIG, key=KEY)
  # Killed before the first checkpoint, between two, and once more right after one.
  for done in (2, 4, 8):
    with pytest.raises(Killed):
      distill(network, teacher, images, CONFIG, key=KEY, workdir=tmp_path, callback=kill_at(done))
  resumed, again = distill_with_history(network, teacher, images, CONFIG, key=KEY, workdir=tmp_path)
  np.testing.assert_array_equal(flat(resumed), flat(whole))
  assert again == history
  finished = distill(network, teacher, images, CONFIG, key=KEY, workdir=tmp_path, callback=kill_at(0))
  np.testing.assert_array_equal(flat(finished), flat(whole))


def test_resuming_starts_at_the_checkpoint(
  student: Network, teacher: Network, images: np.ndarray, tmp_path: Any
) -> None:
  with pytest.raises(Killed):
    distill(student, teacher, images, CONFIG, key=KEY, workdir=tmp_path, callback=kill_at(8))
  seen: list[int] = []
  distill(student, teacher, images, CONFIG, key=KEY, workdir=tmp_path, callback=lambda step, *_: seen.append(step))
  assert seen == [8, 9], "step 6 was stored, so steps 2, 4 and 6 are not run again"


@pytest.mark.parametrize(("number", "ends_with"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_asked_to_stop_it_saves_first(
  student: Network, teacher: Network, images: np.ndarray, tmp_path: Any, number: int, ends_with: type
) -> None:
  config = CONFIG.replace(checkpoint_every=1000)
  whole = distill(student, teacher, images, config, key=KEY)

  def ask(step: int, metrics: dict[str, float], network: Any) -> None:
    if step == 4:
      os.kill(os.getpid(), number)

  with pytest.raises(ends_with):
    distill(student, teacher, images, config, key=KEY, workdir=tmp_path, callback=ask)
  seen: list[int] = []
  resumed = distill(student, teacher, images, config, key=KEY, workdir=tmp_path, callback=lambda s, *_: seen.append(s))
  assert seen == [6, 8, 9]
  np.testing.assert_array_equal(flat(resumed), flat(whole))


def test_another_runs_folder_is_refused(student: Network, teacher: Network, images: np.ndarray, tmp_path: Any) -> None:
  config = CONFIG.replace(steps=2)
  distill(student, teacher, images, config, key=KEY, workdir=tmp_path)
  with pytest.raises(CheckpointError, match=r"config\.momentum is 0.9 there and 0.5 now"):
    distill(student, teacher, images, config.replace(momentum=0.5), key=KEY, workdir=tmp_path)
  with pytest.raises(CheckpointError, match="images is "):
    distill(student, teacher, images[1:], config, key=KEY, workdir=tmp_path)


@pytest.mark.parametrize("batch_size", [16, 13])
def test_eight_devices_do_what_one_does(
  student: Network, teacher: Network, images: np.ndarray, batch_size: int
) -> None:
  config = CONFIG.replace(steps=3, batch_norm="train", batch_size=batch_size)
  one, eight = (distill(student, teacher, images, config, key=KEY, devices=n) for n in (1, 8))
  for field in ("params", "batch_stats"):
    a, b = flat(one.variables[field]), flat(eight.variables[field])
    moved = np.linalg.norm(a - flat(student.variables[field]))
    assert np.linalg.norm(a - b) <= 1e-4 * moved


@pytest.mark.parametrize("devices", [1, 3])
def test_images_on_the_host_give_what_resident_ones_give(
  student: Network, teacher: Network, images: np.ndarray, devices: int
) -> None:
  config = CONFIG.replace(steps=3)
  resident = distill(student, teacher, images, config, key=KEY, devices=devices)
  streamed = distill(student, teacher, images, config.replace(resident_bytes=0), key=KEY, devices=devices)
  np.testing.assert_allclose(flat(streamed.variables), flat(resident.variables), rtol=1e-5, atol=1e-6)


def test_the_step_is_traced_once(student: Network, teacher: Network, images: np.ndarray) -> None:
  traces: list[int] = []

  def counted(key: jax.Array, x: jax.Array) -> jax.Array:
    traces.append(1)
    return x

  distill(make_quantized(student, images), teacher, images, CONFIG.replace(augment=counted), key=KEY)
  assert len(traces) == 2, "once for the images, once for their partners"


def test_non_finite_loss_stops_with_step_term_and_checkpoint(
  student: Network, teacher: Network, images: np.ndarray, tmp_path: Any
) -> None:
  config = DistillConfig(30, batch_size=16, learning_rate=1e12, warmup_steps=0, batch_norm="frozen", log_every=5)
  with pytest.raises(NonFiniteError, match=r"became NaN or infinite at step \d+; there is no checkpoint before it"):
    distill(student, teacher, images, config, key=KEY)
  config = config.replace(checkpoint_every=1)
  with pytest.raises(NonFiniteError, match=r"step \d+; the last good checkpoint is .*checkpoints/\d+") as caught:
    distill(student, teacher, images, config, key=KEY, workdir=tmp_path)
  bad = int(str(caught.value).split("at step ")[1].split(";")[0])
  assert str(caught.value).endswith(f"checkpoints/{bad}"), "the state after `bad` steps is the last good one"


def test_arguments_that_do_not_fit(student: Network, teacher: Network, images: np.ndarray) -> None:
  def attempt(**changes: Any) -> None:
    given = {"images": images, "config": CONFIG, "devices": None, **changes}
    distill(student, teacher, given["images"], given["config"], key=KEY, devices=given["devices"])

  with pytest.raises(KwjaxError, match=r"shape \(n, 8, 8, 3\), found \(48, 4, 8, 3\)"):
    attempt(images=images[:, :4])
  with pytest.raises(DataError, match="there are no images"):
    attempt(images=images[:0])
  with pytest.raises(DataError, match=r"in units of \[0, 1\] .* from .* to 255"):
    attempt(images=images / images.max() * 255)
  with pytest.raises(DataError, match="nan"):
    attempt(images=np.where(images > 0.999, np.nan, images))
  with pytest.raises(KwjaxError, match="99 devices were asked for"):
    attempt(devices=99)
  with pytest.raises(KwjaxError, match="has no module 'layer7'"):
    attempt(config=CONFIG.replace(stages=("layer7",)))


def test_no_steps_returns_the_student_itself(student: Network, teacher: Network, images: np.ndarray) -> None:
  trained, history = distill_with_history(student, teacher, images, DistillConfig(0), key=KEY)
  np.testing.assert_array_equal(flat(trained.variables), flat(student.variables))
  assert history == []


def test_progress_shows_loss_agreement_and_speed(
  student: Network, teacher: Network, images: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
  distill(student, teacher, images, CONFIG.replace(steps=2), key=KEY, progress=True)
  shown = capsys.readouterr().err
  assert all(word in shown for word in ("loss", "KL", "agreement", "images/s", "2/2"))
