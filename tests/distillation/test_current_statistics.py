"""Teachers whose BatchNorm layers use the batch, and students whose statistics are made anew: distillation from noise."""

from __future__ import annotations

from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kwjax.batchnorm import adjust_statistics, current_layers, reference_moments
from kwjax.distillation import DistillConfig, distill, distill_step, initial_state
from kwjax.errors import DataError, KwjaxError
from kwjax.intercept import batch_norm_layers
from kwjax.network import Network
from kwjax.runtime.devices.parallel import device_group

CONFIG = DistillConfig(3, batch_size=16, learning_rate=0.05, iq_weight=0.0, current=(".*",))


def teacher_logits(teacher: Network, images: np.ndarray) -> np.ndarray:
  """With the module's own training mode of BatchNorm."""
  x = (images - np.float32(teacher.input_mean)) / np.float32(teacher.input_std)
  return np.asarray(teacher.module.apply(teacher.variables, x, train=True, mutable=["batch_stats"])[0])


def one_step(student: Any, teacher: Any, batch: np.ndarray, config: DistillConfig, devices: int, weights: Any) -> Any:
  group = device_group(devices)

  def step(state: Any, images: Any, teacher: Any, weights: Any, axis_name: str | None) -> Any:
    return distill_step(state, images, teacher, config, weights, axis_name=axis_name)

  placed = (group.shard(jnp.asarray(batch)), group.replicate(teacher), group.shard(weights))
  return group.first(group.compile(step)(group.replicate(initial_state(student, config)), *placed))


def test_the_teacher_normalizes_with_the_batch(student: Network, teacher: Network, images: np.ndarray) -> None:
  _, metrics = one_step(student, teacher, images[:16], CONFIG, 1, None)
  x = (images[:16] - np.float32(student.input_mean)) / np.float32(student.input_std)
  s = student.module.apply(student.variables, x, train=True, mutable=["batch_stats"])[0]
  t = teacher_logits(teacher, images[:16])
  expected = jnp.mean(optax.losses.kl_divergence(jax.nn.log_softmax(s), jax.nn.softmax(t)))
  np.testing.assert_allclose(metrics["kl"], expected, rtol=1e-4)
  running = one_step(student, teacher, images[:16], CONFIG.replace(current=()), 1, None)[1]["kl"]
  assert abs(running - expected) > 0.01 * expected


@pytest.mark.parametrize(("count", "devices"), [(16, 8), (5, 2)])
def test_devices_and_padding_make_no_difference(
  student: Network, teacher: Network, images: np.ndarray, count: int, devices: int
) -> None:
  one = one_step(student, teacher, images[:count], CONFIG, 1, None)[1]
  padded = -(-count // devices) * devices
  weights = None if padded == count else jnp.asarray(np.arange(padded) < count, jnp.float32)
  batch = np.concatenate([images[:count], np.ones((padded - count, *images.shape[1:]), np.float32)])
  many = one_step(student, teacher, batch, CONFIG, devices, weights)[1]
  for name in ("kl", "gradient_norm"):
    np.testing.assert_allclose(many[name], one[name], rtol=2e-5, err_msg=name)


def test_adam_is_optax_adam_and_unknown_names_are_refused(
  student: Network, teacher: Network, images: np.ndarray
) -> None:
  config = CONFIG.replace(algorithm="adam", learning_rate=1e-3)
  state, _ = one_step(student, teacher, images[:16], config, 1, None)
  moved = [np.abs(a - b) for a, b in zip(*(jax.tree.leaves(s.variables["params"]) for s in (state.student, student)))]
  # Adam's first step is the learning rate in the direction of the gradient's sign.
  assert max(m.max() for m in moved) == pytest.approx(1e-3, rel=0.02)
  with pytest.raises(KwjaxError, match="'rmsprop'; known: sgd, adam"):
    CONFIG.replace(algorithm="rmsprop")
  with pytest.raises(KwjaxError, match=r"no BatchNorm layer of teacher matches 'bn9' of current; there are stem_bn"):
    distill(student, teacher, images, CONFIG.replace(current=("bn9",)), key=jax.random.key(0))


def test_settings_name_the_algorithm_and_the_layers() -> None:
  noise = DistillConfig.preset("noise").to_json()
  assert (noise["algorithm"], list(noise["current"])) == ("adam", [".*"])


def test_a_share_of_the_layers_keeps_its_running_statistics(teacher: Network) -> None:
  names = batch_norm_layers(teacher)
  assert len(names) == 5
  assert current_layers(teacher, 0.0, jax.random.key(0)) == names
  assert current_layers(teacher, 1.0, jax.random.key(0)) == ()
  drawn = [current_layers(teacher, 0.5, jax.random.key(seed)) for seed in range(20)]
  assert all(len(layers) == 2 for layers in drawn)  # ceil(0.5 * 5) = 3 keep theirs
  assert all(list(layers) == sorted(layers, key=names.index) for layers in drawn)
  assert set().union(*drawn) == set(names)
  with pytest.raises(KwjaxError, match=r"must lie in \[0, 1\], found 1.5"):
    current_layers(teacher, 1.5, jax.random.key(0))


@pytest.mark.parametrize("devices", [1, 5])  # 12 images get padding on five
def test_adjusted_statistics_are_the_pooled_ones_of_training_mode(
  student: Network, images: np.ndarray, devices: int
) -> None:
  adjusted = adjust_statistics(student, images[:36], batch_size=12, devices=devices)
  # With momentum 0 Flax stores the statistics of the batch itself; the first layer's input does not depend on the batch.
  x = (images[:36] - np.float32(student.input_mean)) / np.float32(student.input_std)
  stem = np.asarray(jax.lax.conv_general_dilated(
    x, student.variables["params"]["stem"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  ), np.float64)  # fmt: skip
  found = reference_moments(adjusted)
  np.testing.assert_allclose(found["stem_bn"].mean, stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found["stem_bn"].var, stem.var((0, 1, 2)), rtol=1e-4)
  # The last layer: batches by hand, in the module's own training mode.
  means, variances = [], []
  for start in (0, 12, 24):
    mutated = student.module.apply(student.variables, x[start : start + 12], train=True, mutable=["batch_stats"])[1]
    for field, into in (("mean", means), ("var", variances)):
      old, new = (v["batch_stats"]["block3"]["BatchNorm_0"][field] for v in (student.variables, mutated))
      into.append((np.asarray(new, np.float64) - 0.8 * np.asarray(old, np.float64)) / 0.2)
  mean = np.mean(means, 0)
  last = found["block3/BatchNorm_0"]
  np.testing.assert_allclose(last.mean, mean, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(last.var, np.mean(variances, 0) + np.var(means, 0), rtol=1e-3, atol=1e-4)
  weights = [flax.traverse_util.flatten_dict(n.variables["params"]) for n in (student, adjusted)]
  assert all(np.array_equal(weights[0][k], weights[1][k]) for k in weights[0])
  with pytest.raises(DataError, match="at least two images in a batch, found 1"):
    adjust_statistics(student, images[:1])
