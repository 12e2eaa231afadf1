"""Algorithm 1: one step against NumPy Adam, clamping, many devices, and what the objective is for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.errors import NoBatchNormError
from kwjax.runtime.devices.parallel import device_group, value_and_grad_of_shard, weighted_mean
from kwjax.synthesis import Augmentation, SynthesisConfig, initial_state, synthesis_loss, synthesis_step
from kwjax.synthesis.pixels import SynthesisState, watched_layers
from tests.networks import tiny_network

SCHEMES = ("bns", "inception", "bns+inception", "deepinversion")


def small(scheme: str, **changes: object) -> SynthesisConfig:
  return SynthesisConfig.preset(scheme).replace(
    **{"steps": 20, "batch_size": 16, "duplicates": 2, "drops": (), **changes}
  )


def gradient_on(devices: int, config: SynthesisConfig) -> tuple[float, np.ndarray]:
  group, network = device_group(devices), tiny_network()
  images, labels = jax.random.uniform(jax.random.key(3), (16, 8, 8, 3)), jnp.arange(16) % 5

  def step(images: jax.Array, labels: jax.Array, network: object, key: jax.Array, axis_name: str | None) -> tuple:
    loss = functools.partial(
      synthesis_loss, network=network, labels=labels, key=key, config=config, axis_name=axis_name
    )
    return value_and_grad_of_shard(loss, axis_name)(images)

  (loss, _), gradient = group.compile(step)(
    group.shard(images), group.shard(labels), group.replicate(network), group.replicate(jax.random.key(5))
  )
  return float(group.first(loss)), group.unshard(gradient)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_on_eight_devices_equals_that_on_one(scheme: str) -> None:
  (loss, gradient), (loss8, gradient8) = (gradient_on(devices, small(scheme)) for devices in (1, 8))
  assert loss8 == pytest.approx(loss, rel=1e-5)
  assert np.abs(gradient).max() > 0
  assert np.abs(gradient8 - gradient).max() <= 1e-5 * np.abs(gradient).max()


VIEWS = Augmentation(crop_resize=(0.4, 1.0), pad_crop=1, flip=True, cutout=0.25)


def padded_gradient(scheme: str, count: int, size: int, devices: int) -> tuple[dict, np.ndarray]:
  """Metrics and image gradients of `count` images in a batch of `size`; what pads it is noise, labels included."""
  config = small(scheme, augmentation=VIEWS)
  if scheme == "deepinversion":  # and with it all terms that are in no preset
    own = ("own", 0.1, lambda e: weighted_mean(jnp.square(e.logits), e.weights))
    objective = dataclasses.replace(config.objective, smoothness=1.0, image_l2=0.01, extra=(own,))
    config = config.replace(objective=objective)
  group, network = device_group(devices), tiny_network()
  images = jax.random.uniform(jax.random.key(3), (13, 8, 8, 3))[:count]
  noise = jax.random.uniform(jax.random.key(4), (size - count, 8, 8, 3))
  labels = jnp.append(jnp.arange(count) % 5, jnp.full(size - count, 4))
  weights = jnp.append(jnp.ones(count), jnp.zeros(size - count)) if size > count else None

  def step(
    images: jax.Array, labels: jax.Array, weights: jax.Array | None, network: object, axis_name: str | None
  ) -> tuple:
    def loss(images: jax.Array) -> tuple:
      return synthesis_loss(images, network, labels, jax.random.key(5), config, weights, axis_name=axis_name)

    return value_and_grad_of_shard(loss, axis_name)(images)

  (_, metrics), gradient = group.compile(step)(
    group.shard(jnp.concatenate([images, noise])), group.shard(labels), group.shard(weights), group.replicate(network)
  )
  return jax.device_get(group.first(metrics)), group.unshard(gradient)


@functools.cache
def plain_gradient(scheme: str, count: int) -> tuple[dict, np.ndarray]:
  return padded_gradient(scheme, count, count, 1)


CASES = [
  *((scheme, count, devices) for scheme in SCHEMES[2:] for count, devices in ((1, 8), (5, 1), (13, 8))),
  *((scheme, count, devices) for scheme in SCHEMES[:2] for count, devices in ((5, 2),)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "count", "devices"), CASES)
def test_padding_changes_no_gradient_and_no_metric(scheme: str, count: int, devices: int) -> None:
  metrics, gradient = plain_gradient(scheme, count)
  size = (
    count + devices - count % devices
  )  # at least one image of padding; with one image on eight, seven devices of it
  padded, padded_images = padded_gradient(scheme, count, size, devices)
  assert np.abs(gradient).max() > 0
  assert np.abs(padded_images[:count] - gradient).max() <= 1e-5 * np.abs(gradient).max()
  np.testing.assert_array_equal(padded_images[count:], 0.0)
  assert set(padded) == set(metrics)
  for name, value in metrics.items():
    np.testing.assert_allclose(padded[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_padding_stays_finite_and_still_while_images_move() -> None:
  """One image on eight devices: seven hold padding alone, and all of its Adam moments are zero."""
  group, network, config = device_group(8), tiny_network(), small("deepinversion")
  state = initial_state(config, jax.random.uniform(jax.random.key(0), (8, 8, 8, 3)))
  placed = jax.tree.map(lambda leaf: group.shard(leaf) if leaf.ndim else group.replicate(leaf), state)

  def one(
    state: SynthesisState, labels: jax.Array, network: object, key: jax.Array, w: jax.Array, axis_name: str
  ) -> tuple:
    return synthesis_step(state, labels, network, key, config, w, axis_name=axis_name)

  step, network, key = group.compile(one), group.replicate(network), group.replicate(jax.random.key(1))
  labels, weights = group.shard(jnp.zeros(8, jnp.int32)), group.shard(jnp.array([1.0, 0, 0, 0, 0, 0, 0, 0]))
  for _ in range(2):
    placed, metrics = step(placed, labels, network, key, weights)
  assert int(group.first(placed.bad_step)) == -1
  assert np.isfinite(group.first(metrics)["loss"])
  images = group.unshard(placed.images)
  np.testing.assert_array_equal(images[1:], state.images[1:])
  assert np.abs(images[0] - state.images[0]).max() > 0


def test_batch_of_padding_alone_is_finite() -> None:
  """No driver makes one; it must end in a number all the same, not in NaN."""
  network, config = tiny_network(), small("deepinversion")
  loss = functools.partial(
    synthesis_loss,
    network=network,
    labels=jnp.zeros(2, jnp.int32),
    key=jax.random.key(0),
    config=config,
    weights=jnp.zeros(2),
  )
  (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.full((2, 8, 8, 3), 0.5))
  assert bool(jnp.isfinite(value))
  np.testing.assert_array_equal(gradient, 0.0)


def test_a_step_is_clamp_then_adam_with_drops() -> None:
  network, config = tiny_network(), small("bns", drops=(2,), learning_rate=0.05)
  start = 2 * jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
  labels, key = jnp.zeros(16, jnp.int32), jax.random.key(1)
  state, step = initial_state(config, start), jax.jit(functools.partial(synthesis_step, config=config))
  x, m, v = np.asarray(start, np.float64), 0.0, 0.0
  loss = lambda images, key: synthesis_loss(images, network, labels, key, config)[0]
  gradient_of = jax.jit(jax.grad(loss))
  for t in range(3):
    state, _ = step(state, labels, network, key)
    x = np.clip(x, 0, 1)
    gradient = np.asarray(gradient_of(jnp.asarray(x, jnp.float32), jax.random.fold_in(key, t)), np.float64)
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
    rate = 0.05 * (0.1 if t >= 2 else 1.0)
    x = x - rate * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
    # Adam divides by the root of tiny gradients, so single pixels may differ more than the rest.
    assert np.quantile(np.abs(np.asarray(state.images) - x), 0.999) < 1e-3
    x = np.asarray(state.images, np.float64)
  assert int(state.step) == 3


def test_saturated_pixels_still_get_a_gradient() -> None:
  network, config = tiny_network(), small("bns")
  state = initial_state(config, jnp.full((16, 8, 8, 3), 5.0))
  step = jax.jit(functools.partial(synthesis_step, config=config))
  state, _ = step(state, jnp.zeros(16, jnp.int32), network, jax.random.key(0))
  assert float((state.images != 1.0).mean()) > 0.5


@pytest.mark.parametrize("scheme", ["bns", "bns+inception"])
def test_optimizing_lowers_the_divergence_and_reaches_targets(scheme: str) -> None:
  network, config = tiny_network(), small(scheme, learning_rate=0.05)
  labels = jnp.arange(16) % 5
  state = initial_state(config, jax.random.normal(jax.random.key(0), (16, 8, 8, 3)))
  step = jax.jit(functools.partial(synthesis_step, config=config))
  curve = []
  for _ in range(40):
    state, metrics = step(state, labels, network, jax.random.key(1))
    curve.append(float(metrics["bns"]))
  assert curve[-1] < 0.5 * curve[0]


def test_nan_is_traced_to_step_and_layer() -> None:
  network, config = tiny_network(), small("bns")
  variables = jax.tree.map(lambda leaf: leaf, network.variables)
  variables["params"]["bn0"]["bias"] = variables["params"]["bn0"]["bias"].at[0].set(jnp.nan)
  network = network.replace(variables=variables)
  state = initial_state(config, jnp.full((16, 8, 8, 3), 0.5))
  step = jax.jit(functools.partial(synthesis_step, config=config))
  assert isinstance(state, SynthesisState)
  for _ in range(2):
    state, _ = step(state, jnp.zeros(16, jnp.int32), network, jax.random.key(0))
  assert int(state.bad_step) == 0
  assert watched_layers(network, config)[int(state.bad_term)] == "bn1"  # the NaN enters behind bn0


def test_scheme_without_statistics_runs_without_batch_norm() -> None:
  network = tiny_network(batch_norm=False)
  images = jnp.full((4, 8, 8, 3), 0.5)
  loss, _ = synthesis_loss(images, network, jnp.arange(4), jax.random.key(0), small("inception"))
  assert bool(jnp.isfinite(loss))
  with pytest.raises(NoBatchNormError):
    synthesis_loss(images, network, jnp.arange(4), jax.random.key(0), small("bns"))
