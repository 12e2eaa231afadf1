"""Supervised training: one step against Flax's own, many devices, resuming to the bit, learning, refusals."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kwjax.errors import CheckpointError, DataError, KwjaxError, NonFiniteError
from kwjax.network import Network
from kwjax.synthesis import Augmentation
from kwjax.training import TrainConfig, initial_variables, train, train_with_history

KEY = jax.random.key(5)
CONFIG = TrainConfig(6, batch_size=16, learning_rate=0.05, warmup_steps=2, log_every=2, checkpoint_every=3)


class SmallNet(nn.Module):
  """One convolution, BatchNorm and a classifier of five classes."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = nn.Conv(6, (3, 3), (2, 2), use_bias=False, name="conv")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8, name="bn")(x))
    return nn.Dense(5, name="fc")(x.mean((1, 2)))


def network() -> Network:
  variables = initial_variables(SmallNet(), (8, 8, 3), key=jax.random.key(0))
  return Network(SmallNet(), variables, image_shape=(8, 8, 3), input_mean=(0.4,) * 3, input_std=(0.3,) * 3, name="tiny")


def data(count: int = 48) -> tuple[np.ndarray, np.ndarray]:
  """Noisy images u8 whose class is their colour."""
  rng = np.random.default_rng(0)
  labels = np.arange(count) % 5
  colours = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
  return (rng.integers(0, 90, (count, 8, 8, 3)) + 160 * colours[labels][:, None, None]).astype(np.uint8), labels


def flat(tree: Any) -> np.ndarray:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_a_step_is_flax_and_optax_by_hand() -> None:
  start, (x, y) = network(), data(16)
  config = TrainConfig(1, batch_size=16, learning_rate=0.2, weight_decay=0.1, label_smoothing=0.2)
  trained, history = train_with_history(start, x, y, config, key=KEY)
  targets = 0.8 * np.eye(5)[y] + 0.2 / 5
  normalized = (x / 255.0 - 0.4) / 0.3

  def loss(params: Any) -> tuple[jax.Array, Any]:
    variables = {**start.variables, "params": params}
    logits, mutated = SmallNet().apply(variables, jnp.float32(normalized), train=True, mutable=["batch_stats"])
    return -(targets * jax.nn.log_softmax(logits)).sum(1).mean(), mutated["batch_stats"]

  (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(start.variables["params"])
  np.testing.assert_allclose(history[0]["loss"], value, rtol=1e-5)
  assert history[0]["learning_rate"] == pytest.approx(0.2)
  np.testing.assert_allclose(flat(trained.variables["batch_stats"]), flat(statistics), rtol=1e-4, atol=1e-5)
  for layer, values in start.variables["params"].items():
    for name, value in values.items():
      decay = 0.1 * value if name == "kernel" else 0.0
      expected = value - 0.2 * (gradient[layer][name] + decay)
      np.testing.assert_allclose(trained.variables["params"][layer][name], expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("devices", "batch_size"), [(2, 16), (8, 13)])
def test_several_devices_do_what_one_does(devices: int, batch_size: int) -> None:
  config = CONFIG.replace(steps=3, batch_size=batch_size, augmentation=Augmentation(pad_crop=1, flip=True))
  (one, first), (several, second) = (
    train_with_history(network(), *data(), config.replace(log_every=1), key=KEY, devices=n) for n in (1, devices)
  )
  assert np.linalg.norm(flat(one.variables) - flat(several.variables)) <= 1e-4 * np.linalg.norm(
    flat(one.variables) - flat(network().variables)
  )
  for a, b in zip(first, second, strict=True):
    assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


class Killed(Exception):
  pass


def test_killed_and_started_again_gives_the_same_bits(tmp_path: pathlib.Path) -> None:
  config = CONFIG.replace(augmentation=Augmentation(pad_crop=1, flip=True))
  whole, history = train_with_history(network(), *data(), config, key=KEY)

  def kill(step: int, *_: Any) -> None:
    if step >= 4:
      raise Killed

  with pytest.raises(Killed):
    train(network(), *data(), config, key=KEY, workdir=tmp_path, callback=kill)
  seen: list[int] = []
  resumed, again = train_with_history(
    network(), *data(), config, key=KEY, workdir=tmp_path, callback=lambda step, *_: seen.append(step)
  )
  assert seen == [4, 6], "step 3 was stored"
  np.testing.assert_array_equal(flat(resumed.variables), flat(whole.variables))
  assert again == history
  with pytest.raises(CheckpointError, match=r"config\.weight_decay is 0.0001 there and 0.5 now"):
    train(network(), *data(), config.replace(weight_decay=0.5), key=KEY, workdir=tmp_path)
  with pytest.raises(CheckpointError, match="images is "):
    train(network(), data()[0], data()[1][::-1], config, key=KEY, workdir=tmp_path)


def test_it_learns_and_keeps_its_statistics_up_to_date() -> None:
  x, y = data()
  config = TrainConfig(80, batch_size=16, learning_rate=0.1, warmup_steps=4)
  trained, history = train_with_history(network(), x, y, config, key=KEY)
  assert history[-1]["accuracy"] > 0.9
  # In evaluation mode, hence with the running statistics.
  assert np.mean(np.argmax(trained.apply(x / np.float32(255)), 1) == y) > 0.9


def test_images_on_the_host_give_what_resident_ones_give() -> None:
  resident = train(network(), *data(), CONFIG, key=KEY, devices=2)
  streamed = train(network(), *data(), CONFIG.replace(resident_bytes=0), key=KEY, devices=2)
  np.testing.assert_allclose(flat(streamed.variables), flat(resident.variables), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_trained_is_refused() -> None:
  x, y = data()
  with pytest.raises(KwjaxError, match=r"images of tiny have shape \(n, 8, 8, 3\), found \(48, 4, 8, 3\)"):
    train(network(), x[:, :4], y, CONFIG, key=KEY)
  with pytest.raises(DataError, match="there are no images"):
    train(network(), x[:0], y[:0], CONFIG, key=KEY)
  with pytest.raises(DataError, match="below 5, found 1..5"):
    train(network(), x, y + 1, CONFIG, key=KEY)
  with pytest.raises(DataError, match="found values from .* to 299"):
    train(network(), np.full(x.shape, 299.0), y, CONFIG, key=KEY)
  with pytest.raises(NonFiniteError, match=r"training of tiny: the (loss|gradient) became NaN or infinite at step \d"):
    train(network(), x, y, CONFIG.replace(learning_rate=1e30, warmup_steps=0), key=KEY)
  for changes, text in (
    ({"momentum": 1.0}, "momentum"),
    ({"learning_rate": 0.0}, "learning_rate"),
    ({"steps": 1}, "warmup"),
  ):
    with pytest.raises(KwjaxError, match=text):
      CONFIG.replace(**changes)


def test_the_optimizer_is_momentum_with_a_cosine() -> None:
  config = TrainConfig(4, learning_rate=1.0, momentum=0.5, weight_decay=0.0)
  params = {"layer": {"kernel": jnp.zeros(()), "bias": jnp.zeros(())}}
  state = config.optimizer().init(params)
  for rate, velocity in zip(0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)), (1.0, 1.5, 1.75, 1.875), strict=True):
    updates, state = config.optimizer().update(jax.tree.map(jnp.ones_like, params), state, params)
    assert float(updates["layer"]["bias"]) == pytest.approx(-rate * velocity, rel=1e-5)
    params = optax.apply_updates(params, updates)
