"""Observation of modules that know nothing of it: compact, setup, partial, nested, shared, remat, scan, top-level."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.batchnorm import Moments, freeze, observe, observing, recorded_moments, reference_moments, weigh
from kwjax.errors import KwjaxError, NoBatchNormError
from kwjax.intercept import batch_norm_layers, layers
from tests.networks import random_network, tiny_network


class Block(nn.Module):
  """Compact; BatchNorm given as a partial, its input by keyword."""

  norm: functools.partial = functools.partial(nn.BatchNorm, use_running_average=True)

  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    return nn.relu(self.norm()(x=nn.Conv(6, (3, 3))(x))), None


class SetupNet(nn.Module):
  """Setup style, BatchNorm called with the argument rather than built with it."""

  def setup(self) -> None:
    self.stem = nn.Conv(6, (3, 3))
    self.norm = nn.BatchNorm()
    self.blocks = [Block(), Block()]
    self.head = nn.Dense(4)

  def __call__(self, x: jax.Array, is_training: bool = True) -> jax.Array:
    x = self.norm(self.stem(x), use_running_average=not is_training)
    for block in self.blocks:
      x, _ = block(x)
    return self.head(x.mean((1, 2)))


class LiftedNet(nn.Module):
  """Under scan and remat, and one layer that is called twice."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = nn.Conv(6, (1, 1))(x)
    stack = nn.scan(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)
    x, _ = stack(name="stack")(x, None)
    x, _ = nn.remat(Block)(name="remat")(x)
    shared = nn.BatchNorm(use_running_average=not train, name="shared")
    x = shared(nn.relu(shared(x)))
    return nn.Dense(4)(x.mean((1, 2)))


class UnrolledNet(nn.Module):
  """LiftedNet without transforms and sharing, with the same variables."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(6, (1, 1))(x)
    for i in range(3):
      x, _ = Block(name=f"stack_{i}")(x)
    x, _ = Block(name="remat")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=True, name="shared_a")(x))
    x = nn.BatchNorm(use_running_average=True, name="shared_b")(x)
    return nn.Dense(4)(x.mean((1, 2)))


def images(count: int = 6) -> jax.Array:
  return jax.random.uniform(jax.random.key(9), (count, 8, 8, 3))


def test_moments_are_those_of_the_inputs_and_logits_are_unchanged() -> None:
  network = tiny_network()
  logits, measured = jax.jit(observe)(network, images())
  np.testing.assert_allclose(logits, network.apply(images()), rtol=1e-6, atol=1e-6)
  x = (images() - 0.45) / 0.25
  x = nn.Conv(8, (3, 3), use_bias=False).apply({"params": network.variables["params"]["conv0"]}, x)
  np.testing.assert_allclose(measured["bn0"].mean, x.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(measured["bn0"].var, x.var((0, 1, 2)), rtol=1e-5)


def test_setup_partials_lists_and_keyword_inputs() -> None:
  network = random_network(SetupNet())
  _, measured = observe(network, images())
  assert list(measured) == ["norm", "blocks_0/BatchNorm_0", "blocks_1/BatchNorm_0"]
  assert network.call_options == {"is_training": False}


def test_scan_remat_and_shared_equal_the_unrolled_network() -> None:
  network = random_network(LiftedNet())
  variables = network.variables
  unrolled: dict = {"params": {}, "batch_stats": {}}
  for kind in unrolled:
    for name, tree in variables[kind].items():
      if name == "stack":
        for i in range(3):
          unrolled[kind][f"stack_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], tree)
      elif name == "shared":
        unrolled[kind]["shared_a"] = unrolled[kind]["shared_b"] = tree
      else:
        unrolled[kind][name] = tree
  plain = network.replace(module=UnrolledNet(), variables=unrolled, call_options=None)

  def loss(network: object, x: jax.Array) -> jax.Array:
    _, measured = observe(network, x)
    return sum(m.mean.sum() + m.var.sum() for name, m in measured.items() if "shared" not in name)

  logits, measured = jax.jit(observe)(network, images())
  expected_logits, expected = observe(plain, images())
  np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-5)
  for i in range(3):
    np.testing.assert_allclose(
      measured[f"stack/BatchNorm_0[{i}]"].var, expected[f"stack_{i}/BatchNorm_0"].var, rtol=1e-4
    )
  np.testing.assert_allclose(
    measured["remat/BatchNorm_0"].mean, expected["remat/BatchNorm_0"].mean, rtol=1e-4, atol=1e-5
  )
  a, b = expected["shared_a"], expected["shared_b"]
  np.testing.assert_allclose(measured["shared"].mean, (a.mean + b.mean) / 2, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    measured["shared"].var, (a.var + b.var) / 2 + ((a.mean - b.mean) / 2) ** 2, rtol=1e-4, atol=1e-5
  )
  gradient, expected_gradient = (jax.jit(jax.grad(loss, argnums=1))(n, images()) for n in (network, plain))
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-6)
  assert set(reference_moments(network)) == set(measured)


def test_current_statistics_equal_flax_in_training_mode() -> None:
  network = tiny_network()
  expected, _ = network.module.apply(network.variables, (images() - 0.45) / 0.25, train=True, mutable=["batch_stats"])
  logits, _ = observe(network, images(), current=[".*"])
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  assert not np.allclose(logits, network.apply(images()), atol=1e-3)


def test_statistics_are_chosen_by_layer_and_frozen_ones_win() -> None:
  network = tiny_network()
  _, measured = observe(network, images(), current=["bn0"])
  apply = observing(network.forward, current=[".*"])
  variables = freeze(network.variables, {"bn0": measured["bn0"], "bn1": reference_moments(network)["bn1"]})
  logits, mutated = jax.jit(apply)(variables, images())
  np.testing.assert_allclose(logits, observe(network, images(), current=["bn0"])[0], rtol=1e-5, atol=1e-6)
  frozen = {"bn0": Moments(jnp.zeros(8), jnp.ones(8))}
  other, _ = jax.jit(apply)(freeze(network.variables, frozen), images())
  assert not np.allclose(other, logits, atol=1e-3)
  assert set(recorded_moments(mutated)) == {"bn0", "bn1"}


def test_frozen_statistics_of_a_stack_and_unknown_names() -> None:
  network = random_network(LiftedNet())
  _, measured = observe(network, images(), current=[".*"])
  stacked = {name: m for name, m in measured.items() if name.startswith("stack")}
  apply = observing(network.forward, current=["remat.*"])
  by_hand, _ = observe(network, images(), current=["stack.*", "remat.*"])
  np.testing.assert_allclose(apply(freeze(network.variables, stacked), images())[0], by_hand, rtol=1e-4, atol=1e-5)
  with pytest.raises(KwjaxError, match="stack of 3"):
    freeze(network.variables, {"stack/BatchNorm_0[0]": stacked["stack/BatchNorm_0[0]"]})
  with pytest.raises(KwjaxError, match="no BatchNorm layer 'typo'"):
    freeze(network.variables, {"typo": stacked["stack/BatchNorm_0[0]"]})
  with pytest.raises(KwjaxError, match="typo"):
    observe(network, images(), current=["typo"])


def test_modules_without_input_are_no_layers() -> None:
  class Scale(nn.Module):
    @nn.compact
    def __call__(self) -> jax.Array:
      return self.param("scale", nn.initializers.ones, ())

  class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      return nn.BatchNorm(use_running_average=True)(Scale()() * x.mean((1, 2)))

  assert list(reference_moments(random_network(Scaled()))) == ["BatchNorm_0"]


def test_a_network_in_training_mode_is_refused_not_run_silently() -> None:
  class Odd(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, is_learning: bool = True) -> jax.Array:
      return nn.BatchNorm(use_running_average=not is_learning)(x.mean((1, 2)))

  network = random_network(Odd())
  with pytest.raises(KwjaxError, match=r"BatchNorm_0 .* training mode: pass Network\(call_options"):
    network.apply(images())
  assert network.replace(call_options={"is_learning": False}).apply(images()).shape == (6, 3)


def test_a_function_that_jit_has_traced_before_is_still_observed() -> None:
  network = tiny_network()
  jax.jit(network.forward)(network.variables, images())
  _, measured = jax.jit(observe)(network, images())
  assert set(measured) == {"bn0", "bn1"}


def test_moments_over_devices_equal_those_on_one() -> None:
  network = tiny_network()
  whole = observe(network, images(16))[1]
  split = jax.pmap(lambda x: observe(network, x, axis_name="d")[1], axis_name="d")(images(16).reshape(8, 2, 8, 8, 3))
  np.testing.assert_allclose(split["bn1"].var[0], whole["bn1"].var, rtol=1e-5)


def test_gradients_by_statistics_over_devices_equal_those_on_one() -> None:
  network = tiny_network()
  # A running mean beside the batch's: what is taken off the input before it is summed must not show.
  stats = jax.tree.map(lambda leaf: leaf + 0.5, network.variables["batch_stats"])

  def loss(params: dict, x: jax.Array, axis_name: str | None) -> jax.Array:
    observed = observing(network.forward, axis_name=axis_name, current=(".*",))
    total = jnp.sum(jnp.sin(observed({"params": params, "batch_stats": stats}, x)[0]))
    return total if axis_name is None else jax.lax.psum(total, axis_name)

  params = network.variables["params"]
  whole = jax.grad(loss, argnums=(0, 1))(params, images(16), None)

  @functools.partial(jax.pmap, axis_name="d", in_axes=(None, 0))
  def split(params: dict, x: jax.Array) -> tuple:
    # The gradient of a psum is one of all devices' sums, so that each holds it times their number.
    by_params, by_images = jax.grad(loss, argnums=(0, 1))(params, x, "d")
    return jax.lax.pmean(by_params, "d"), by_images / jax.device_count()

  by_params, by_images = split(params, images(16).reshape(8, 2, 8, 8, 3))
  by_params = jax.tree.map(lambda leaf: leaf[0], by_params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), by_params, whole[0])
  np.testing.assert_allclose(by_images.reshape(16, 8, 8, 3), whole[1], rtol=1e-3, atol=2e-5)


def stacked_along(axis: int) -> nn.Module:
  class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      axes = {"params": axis, "batch_stats": axis}
      stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
      return stack(name="stack")(nn.Conv(6, (1, 1))(x), None)[0].mean((1, 2))

  return Stacked()


class Folded(nn.Module):
  """Each image as four patches, in the batch."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    patches = x.reshape(b, 2, h // 2, 2, w // 2, c).swapaxes(2, 3).reshape(4 * b, h // 2, w // 2, c)
    y = nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3))(patches))
    return y.reshape(b, -1)


@pytest.mark.parametrize(
  "module", [LiftedNet(), stacked_along(0), stacked_along(1), Folded()], ids=["lifted", "axis 0", "axis 1", "folded"]
)
@pytest.mark.parametrize("padding", [3, 6])  # three images and as many of padding: as many as there are stacked layers
def test_padding_of_weight_zero_changes_no_moment_and_no_gradient(module: nn.Module, padding: int) -> None:
  network, x = random_network(module), images(3 if padding == 3 else 6)
  weights = jnp.append(jnp.ones(len(x)), jnp.zeros(padding))
  noise = 5.0 * jax.random.normal(jax.random.key(2), (padding, 8, 8, 3))

  def loss(x: jax.Array, weights: jax.Array | None) -> tuple:
    logits, measured = observe(network, x, current=[".*"], include_input=True, weights=weights)
    total = sum((i + 1.0) * (m.mean.sum() + jnp.log(m.var).sum()) for i, m in enumerate(measured.values()))
    return total, (logits, measured)

  run = jax.jit(jax.grad(loss, has_aux=True))
  expected, (logits, measured) = run(x, None)
  gradient, (padded_logits, padded) = run(jnp.concatenate([x, noise]), weights)
  assert list(padded) == list(measured)
  for name, moments in measured.items():
    np.testing.assert_allclose(padded[name].mean, moments.mean, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(padded[name].var, moments.var, rtol=1e-4, atol=1e-6, err_msg=name)
  np.testing.assert_allclose(padded_logits[: len(x)], logits, rtol=1e-3, atol=1e-4)
  assert np.abs(gradient[: len(x)] - expected).max() <= 1e-4 * np.abs(expected).max()
  np.testing.assert_array_equal(gradient[len(x) :], 0.0)


def test_a_layer_without_images_along_its_leading_axis_is_named() -> None:
  class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      rows = x.swapaxes(0, 1)
      return nn.BatchNorm(use_running_average=True, name="over_rows")(rows).mean((0, 2))

  network = random_network(Transposed())
  with pytest.raises(KwjaxError, match=r"layer over_rows has an input of shape \(8, 6, 8, 3\).* the 6 images"):
    observe(network, images(), weights=jnp.ones(6))
  assert observe(network, images())[0].shape == (6, 3)


def test_weights_of_a_network_without_batch_norm_go_nowhere() -> None:
  network = tiny_network(batch_norm=False)
  assert weigh(network.variables, jnp.ones(6)) is network.variables


def test_batch_norm_as_the_whole_feature_extractor_keeps_its_path() -> None:
  class Bare(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      return nn.BatchNorm(use_running_average=True)(x.mean((1, 2)))

  _, measured = observe(random_network(Bare()), images())
  np.testing.assert_allclose(measured["BatchNorm_0"].mean, ((images() - 0.45) / 0.25).mean((0, 1, 2)), atol=1e-6)


def test_execution_order_and_layer_facts() -> None:
  network = random_network(LiftedNet())
  assert batch_norm_layers(network) == ("stack/BatchNorm_0", "remat/BatchNorm_0", "shared")
  facts = {layer.name: layer for layer in layers(network)}
  assert facts["stack/Conv_0"].repeats == 3
  assert facts["stack/Conv_0"].multiplications == 3 * (3 * 3 * 6 * 6) * 64
  assert facts["Dense_0"].multiplications == 6 * 4


def test_no_batch_norm_names_the_schemes_that_work() -> None:
  network = tiny_network(batch_norm=False)
  for call in (lambda: observe(network, images()), lambda: reference_moments(network)):
    with pytest.raises(NoBatchNormError, match="gaussian.*inception"):
      call()


def test_a_transform_that_hides_batch_stats_is_named() -> None:
  class Hidden(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      x, _ = nn.map_variables(Block, "batch_stats", mutable=False, init=self.is_initializing())(name="inner")(x)
      return x.mean((1, 2))

  with pytest.raises(KwjaxError, match=r"inner.*BatchNorm_0.*cannot be observed"):
    observe(random_network(Hidden()), images())
