"""The fast forms reach any Flax module through a network, and one switch takes them out, read off the traced programs."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kwjax import Network, kernels
from kwjax.batchnorm import observe
from kwjax.errors import KwjaxError
from kwjax.models.layers import MaxPool
from kwjax.runtime.devices.parallel import DeviceGroup
from tests.networks import random_network

SHAPE = (9, 8, 6)


class Derived(nn.Conv):
  """A convolution that somebody has extended."""

  def __call__(self, inputs: jax.Array) -> jax.Array:
    return 2.0 * super().__call__(inputs)


def reversed_convolution(lhs: jax.Array, rhs: jax.Array, *args: object, **options: object) -> jax.Array:
  return lax.conv_general_dilated(lhs, rhs[::-1], *args, **options)  # type: ignore[arg-type]


class Block(nn.Module):
  """Depthwise and 1x1 convolutions around a residual, with the signature that `nn.scan` asks for."""

  conv: type[nn.Conv] = nn.Conv

  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    y = self.conv(6, (3, 3), feature_group_count=6, name="each")(x)
    y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
    return nn.relu(x + nn.Conv(6, (1, 1))(y)), None


class Plain(nn.Module):
  """A foreign network: a block, a pooling, a strided convolution, a convolution of images without a batch of their own."""

  block: Callable[[], nn.Module] = Block

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x, _ = self.block()(x, None)
    x = MaxPool(3, 2, 1)(x)
    x = nn.Conv(8, (3, 3), 2, padding="CIRCULAR")(x[:, None])[:, 0]
    return nn.Dense(4)(x.mean((1, 2)))


def scanned() -> nn.Module:
  lifted = nn.scan(
    nn.remat(Block), variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2
  )
  return lifted()


class Mapped(nn.Module):
  """A block under nn.vmap."""

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    lifted = nn.vmap(Block, variable_axes={"params": None, "batch_stats": None}, split_rngs={"params": False})
    return lifted()(x[None])[0][0], None


STYLES = {"plain": Block, "subclass": lambda: Block(conv=Derived), "scan and remat": scanned, "vmap": Mapped}


@pytest.fixture(params=STYLES)
def network(request: pytest.FixtureRequest) -> Network:
  return random_network(Plain(STYLES[request.param]), image_shape=SHAPE)


def logits(network: Network, images: jax.Array) -> jax.Array:
  return network.forward(network.variables, images)[0]


def program(network: Network) -> str:
  return str(jax.make_jaxpr(lambda x: logits(network, x))(jnp.zeros((2, *SHAPE))))


def primitives(network: Network) -> dict[str, bool]:
  text = program(network)
  return {name: name in text for name in ("feature_group_count=6", "reduce_window_max")}


IMAGES = jax.random.uniform(jax.random.key(5), (2, *SHAPE))


def test_a_foreign_module_takes_the_fast_forms_and_the_switch_takes_them_out(network: Network) -> None:
  with kernels.enabled(True):
    assert primitives(network) == {"feature_group_count=6": False, "reduce_window_max": False}
    found = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(logits(network, x))))(IMAGES)
  with kernels.enabled(False):
    assert primitives(network) == {"feature_group_count=6": True, "reduce_window_max": True}
    assert "custom_vjp" not in program(network)
    expected = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(logits(network, x))))(IMAGES)
    plain = network.module.apply(network.variables, (IMAGES - 0.45) / 0.25)
    np.testing.assert_array_equal(logits(network, IMAGES), plain)
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_forward_mode_works_where_they_are_off() -> None:
  network = random_network(Plain(), image_shape=SHAPE)
  direction = jax.random.normal(jax.random.key(6), IMAGES.shape)
  with kernels.enabled(False):
    _, tangent = jax.jvp(lambda x: logits(network, x), (IMAGES,), (direction,))
    _, pull = jax.vjp(lambda x: logits(network, x), IMAGES)
  np.testing.assert_allclose(
    jnp.vdot(jnp.ones_like(tangent), tangent), jnp.vdot(pull(jnp.ones_like(tangent))[0], direction), rtol=1e-4
  )


def test_a_compiled_function_is_compiled_anew_when_the_switch_changes() -> None:
  network = random_network(Plain(), image_shape=SHAPE)
  traced = []

  @jax.jit
  def run(x: jax.Array) -> jax.Array:
    traced.append(kernels.are_enabled())
    return logits(network, x)

  run(IMAGES)
  for use in (False, True, False):
    with kernels.enabled(use):
      run(IMAGES)
  assert traced[-2:] == [False, True]
  assert len(traced) == 3  # by default, off, on: the fourth call finds the second's program


def test_a_convolution_of_its_own_is_kept() -> None:
  class Own(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      x = nn.Conv(6, (3, 3), feature_group_count=6, conv_general_dilated=reversed_convolution)(x)
      return nn.Conv(6, (3, 3), feature_group_count=6, conv_general_dilated_cls=lambda: reversed_convolution)(x).mean(
        (1, 2)
      )

  network = random_network(Own(), image_shape=SHAPE)
  with kernels.enabled(True):
    assert program(network).count("feature_group_count=6") == 2
    np.testing.assert_allclose(
      logits(network, IMAGES), network.module.apply(network.variables, (IMAGES - 0.45) / 0.25), rtol=1e-5, atol=1e-6
    )


def test_a_module_that_is_called_without_a_network_is_left_alone() -> None:
  network = random_network(Plain(), image_shape=SHAPE)
  with kernels.enabled(True):
    logits(network, IMAGES)
    text = str(jax.make_jaxpr(lambda x: network.module.apply(network.variables, x))(IMAGES))
  assert "feature_group_count=6" in text
  assert "custom_vjp" not in text


def test_layers_observed_and_maps_over_devices_take_them_too() -> None:
  network = random_network(Plain(), image_shape=SHAPE)

  def observed(x: jax.Array, axis_name: str | None) -> jax.Array:
    return observe(network, x, axis_name=axis_name)[1]["Block_0/BatchNorm_0"].mean

  with kernels.enabled(False):
    expected = observed(IMAGES, None)
  with kernels.enabled(True):
    assert "feature_group_count=6" not in str(jax.make_jaxpr(lambda x: observed(x, None))(IMAGES))
    group = DeviceGroup(tuple(jax.devices()[:2]))
    found = group.compile(observed)(group.shard(np.asarray(IMAGES)))
  np.testing.assert_allclose(group.first(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("asked", ["auto", "off", None])
def test_they_are_for_cpus_and_can_be_switched_off(monkeypatch, backend: str, asked: str | None) -> None:
  monkeypatch.setattr(kernels, "_asked_for", kernels._asked_for.__wrapped__)  # which reads the environment once
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.delenv("KWJAX_CPU_KERNELS", raising=False)
  if asked is not None:
    monkeypatch.setenv("KWJAX_CPU_KERNELS", asked)
  assert kernels.are_enabled() is (backend == "cpu" and asked != "off")
  assert primitives(random_network(Plain(), image_shape=SHAPE))["feature_group_count=6"] is not kernels.are_enabled()
  with jax.default_device(jax.devices("cpu")[0]):
    assert kernels.are_enabled() is (asked != "off")
  with kernels.enabled(True):
    assert kernels.are_enabled()


def test_another_word_in_the_environment_is_one_clear_error(monkeypatch) -> None:
  monkeypatch.setattr(kernels, "_asked_for", kernels._asked_for.__wrapped__)
  monkeypatch.setenv("KWJAX_CPU_KERNELS", "on")
  with pytest.raises(KwjaxError, match="KWJAX_CPU_KERNELS must be auto or off, found 'on'"):
    logits(random_network(Plain(), image_shape=SHAPE), IMAGES)
