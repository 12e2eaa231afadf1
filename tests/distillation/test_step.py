"""One step of Algorithm 2: against a step written out by hand, over devices, in both modes of BatchNorm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kwjax.distillation import DistillConfig, distill_step, initial_state, updated_statistics, watched_terms
from kwjax.distillation.step import track_statistics
from kwjax.network import Network
from kwjax.quantization import QuantRules, calibrate, quantize
from kwjax.runtime.devices.parallel import device_group

CONFIG = DistillConfig(10, batch_size=16, learning_rate=0.05, iq_weight=0.1, temperature=2.0)


def one_step(
  student: Any,
  teacher: Network,
  batch: np.ndarray,
  config: DistillConfig,
  devices: int = 1,
  weights: np.ndarray | None = None,
) -> Any:
  group = device_group(devices)
  step = group.compile(functools.partial(_step, config))
  state = group.replicate(initial_state(student, config))
  return group.first(step(state, group.shard(jnp.asarray(batch)), group.replicate(teacher), group.shard(weights)))


def _step(
  config: DistillConfig,
  state: Any,
  batch: jax.Array,
  teacher: Network,
  weights: jax.Array | None = None,
  axis_name: str | None = None,
) -> Any:
  return distill_step(state, batch, teacher, config, weights, axis_name=axis_name)


def gradient_of(state: Any) -> np.ndarray:
  """After the first step the momentum is the gradient itself."""
  trace = optax.tree_utils.tree_get(state.optimizer, "trace")
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(trace)])


def flat(tree: Any) -> np.ndarray:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.fixture
def quantized(student: Network, images: np.ndarray) -> Any:
  rules = QuantRules.parse("4w4a", first_last="8w8a")
  return quantize(student, rules, calibrate(student, images, rules, key=jax.random.key(0), steps=2, batch_size=16))


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_step_is_the_one_written_by_hand(
  student: Network, teacher: Network, images: np.ndarray, batch_norm: str
) -> None:
  """With the modules' own BatchNorm, Flax's captured intermediates and the losses written out."""
  config = CONFIG.replace(batch_norm=batch_norm)
  state, metrics = one_step(student, teacher, images[:16], config)
  x = (images[:16] - np.float32(teacher.input_mean)) / np.float32(teacher.input_std)
  t, kept = teacher.module.apply(teacher.variables, x, capture_intermediates=True)

  def loss_of(params: Any) -> Any:
    variables, train = {**student.variables, "params": params}, batch_norm == "train"
    collections = ["batch_stats", "intermediates"] if train else ["intermediates"]
    s, out = student.module.apply(variables, x, train=train, capture_intermediates=True, mutable=collections)
    p, logq = jax.nn.softmax(t / 2), jax.nn.log_softmax(s / 2)
    kl = 4 * jnp.mean(jnp.sum(p * (jnp.log(p) - logq), -1))
    pairs = [(out["intermediates"][n]["__call__"][0], kept["intermediates"][n]["__call__"][0]) for n in STAGES]
    iq = sum(jnp.mean(optax.huber_loss(a, b, delta=1.0)) for a, b in pairs)
    return kl + 0.1 * iq, (kl, iq, s, out.get("batch_stats", student.variables["batch_stats"]))

  (loss, (kl, iq, s, stats)), gradient = jax.value_and_grad(loss_of, has_aux=True)(student.variables["params"])
  np.testing.assert_allclose([metrics[k] for k in ("loss", "kl", "iq")], [loss, kl, iq], rtol=1e-4)
  np.testing.assert_allclose(metrics["agreement"], np.mean(np.argmax(s, -1) == np.argmax(t, -1)))
  np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-4)
  expected = flat(jax.tree.map(lambda w, g: w - 0.05 * g, student.variables["params"], gradient))
  np.testing.assert_allclose(flat(state.student.variables["params"]), expected, atol=1e-5)
  np.testing.assert_allclose(flat(state.student.variables["batch_stats"]), flat(stats), rtol=1e-4, atol=1e-5)
  moved = not np.array_equal(flat(stats), flat(student.variables["batch_stats"]))
  assert moved == (batch_norm == "train")


STAGES = ("block1", "block3")


@pytest.mark.parametrize(("kind", "batch_norm"), [("float", "train"), ("quantized", "frozen")])
def test_gradients_on_eight_devices_are_those_on_one(
  student: Network, quantized: Any, teacher: Network, images: np.ndarray, batch_norm: str, kind: str
) -> None:
  config = CONFIG.replace(batch_norm=batch_norm, weight_decay=1e-4)
  network = quantized if kind == "quantized" else student
  (one, metrics), (eight, metrics8) = (one_step(network, teacher, images[:16], config, n) for n in (1, 8))
  g1, g8 = gradient_of(one), gradient_of(eight)
  assert np.linalg.norm(g8 - g1) <= 1e-5 * np.linalg.norm(g1)
  for field in ("params", "batch_stats"):
    a, b = flat(one.student.variables[field]), flat(eight.student.variables[field])
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)
  for name, value in metrics.items():
    np.testing.assert_allclose(metrics8[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("batch_norm", "count", "devices"),
  [("train", 1, (8,)), ("train", 13, (1, 8)), ("frozen", 5, (2,))],
)
def test_padding_changes_no_gradient_no_statistic_and_no_metric(
  student: Network, teacher: Network, batch_norm: str, count: int, devices: tuple[int, ...]
) -> None:
  config = CONFIG.replace(batch_norm=batch_norm)
  batch = np.asarray(jax.random.uniform(jax.random.key(3), (count, 8, 8, 3)))
  plain, metrics = one_step(student, teacher, batch, config)
  g = gradient_of(plain)
  assert np.linalg.norm(g) > 0
  for number in devices:
    padding = number - count % number  # at least one image; with one image on eight, seven devices of padding
    noise = np.random.default_rng(0).normal(size=(padding, 8, 8, 3)).astype(np.float32)
    weights = np.append(np.ones(count), np.zeros(padding)).astype(np.float32)
    padded, found = one_step(student, teacher, np.concatenate([batch, noise]), config, number, weights)
    assert np.linalg.norm(gradient_of(padded) - g) <= 1e-5 * np.linalg.norm(g)
    for field in ("params", "batch_stats"):
      a, b = flat(plain.student.variables[field]), flat(padded.student.variables[field])
      assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)
    for name, value in metrics.items():
      np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=f"{name} on {number} devices")
    assert int(padded.bad_step) == -1


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_equal_networks_have_zero_loss(teacher: Network, images: np.ndarray, batch_norm: str) -> None:
  state, metrics = one_step(teacher, teacher, images[:16], CONFIG.replace(batch_norm=batch_norm))
  if batch_norm == "frozen":
    assert abs(float(metrics["loss"])) < 1e-7
    assert float(metrics["agreement"]) == 1.0
    before, after = flat(teacher.variables["params"]), flat(state.student.variables["params"])
    np.testing.assert_allclose(after, before, atol=1e-6)
  else:
    assert float(metrics["loss"]) > 1e-5, "a batch of 16 does not have the running statistics"


def test_without_iq_weight_stages_cost_nothing_and_count_nothing(
  student: Network, teacher: Network, images: np.ndarray
) -> None:
  _, metrics = one_step(student, teacher, images[:16], CONFIG.replace(iq_weight=0.0))
  assert float(metrics["iq"]) == 0.0
  np.testing.assert_allclose(metrics["loss"], metrics["kl"])


def test_kl_weight_and_iq_weight_scale_their_terms(student: Network, teacher: Network, images: np.ndarray) -> None:
  _, m = one_step(student, teacher, images[:16], CONFIG.replace(kl_weight=0.5, iq_weight=3.0))
  np.testing.assert_allclose(m["loss"], 0.5 * m["kl"] + 3.0 * m["iq"], rtol=1e-6)


def statistics_after(network: Network, images: np.ndarray) -> Any:
  @jax.jit
  def run(x: jax.Array) -> Any:
    _, mutated = track_statistics(network.forward, None)(network.variables, x)
    return updated_statistics(network.variables["batch_stats"], mutated)

  return run(jnp.asarray(images))


def with_random_statistics(network: Network) -> Network:
  """Running statistics that no batch of images has, different in every layer."""
  leaves, structure = jax.tree.flatten(network.variables["batch_stats"])
  keys = jax.random.split(jax.random.key(9), len(leaves))
  stats = structure.unflatten([jax.random.uniform(k, x.shape, minval=0.5) for k, x in zip(keys, leaves)])
  return network.replace(variables={**network.variables, "batch_stats": stats})


def test_shared_layer_counts_all_its_inputs_once(tools: Any, images: np.ndarray) -> None:
  class Shared(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
      norm = nn.BatchNorm(use_running_average=not train, momentum=0.75, name="norm")
      return jnp.concatenate([norm(x), norm(2.0 * x + 1.0)]).mean((1, 2))

  network = with_random_statistics(tools.network(Shared()))
  old = network.variables["batch_stats"]["norm"]
  new = statistics_after(network, images)["norm"]
  x = (images - np.float32(network.input_mean)) / np.float32(network.input_std)
  union = np.concatenate([x, 2.0 * x + 1.0]).reshape(-1, 3)
  np.testing.assert_allclose(new["mean"], 0.75 * old["mean"] + 0.25 * union.mean(0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(new["var"], 0.75 * old["var"] + 0.25 * union.var(0), rtol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_layers_follow_flax(tools: Any, images: np.ndarray, axis: int) -> None:
  class Layer(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
      y = nn.Conv(3, (3, 3), use_bias=False)(x)
      return nn.relu(nn.BatchNorm(use_running_average=not self.train, momentum=0.7, name="norm")(y)), None

  class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
      axes = {"params": axis, "batch_stats": axis}
      scanned = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=4)
      return scanned(train, name="layers")(x, None)[0].mean((1, 2))

  network = with_random_statistics(tools.network(Stacked()))
  x = (images - np.float32(network.input_mean)) / np.float32(network.input_std)
  _, mutated = network.module.apply(network.variables, x, train=True, mutable=["batch_stats"])
  expected = mutated["batch_stats"]["layers"]["norm"]
  found = statistics_after(network, images)["layers"]["norm"]
  for field in ("mean", "var"):
    assert found[field].shape == ((4, 3) if axis == 0 else (3, 4))
    np.testing.assert_allclose(found[field], expected[field], rtol=1e-4, atol=1e-5)


def damage(network: Network, edit: Callable[[dict], None]) -> Network:
  variables = jax.tree.map(lambda x: x, network.variables)
  edit(variables)
  return network.replace(variables=variables)


@pytest.mark.parametrize(
  ("where", "term"),
  [("block3", "the IQ term of stage block3"), ("head", "the KL term"), ("teacher", "the teacher's logits")],
)
def test_first_term_that_is_not_finite_is_noted(
  student: Network, teacher: Network, images: np.ndarray, where: str, term: str
) -> None:
  def edit(variables: dict) -> None:
    layer = variables["params"]["head" if where == "teacher" else where]
    layer.update(jax.tree.map(lambda x: x * jnp.nan, layer))

  if where == "teacher":
    teacher = damage(teacher, edit)
  else:
    student = damage(student, edit)
  state, _ = one_step(student, teacher, images[:16], CONFIG)
  assert int(state.bad_step) == 0
  assert watched_terms(STAGES)[int(state.bad_term)] == term


@pytest.mark.parametrize(("devices", "waits"), [(1, False), (2, True)])
def test_among_devices_the_student_waits_for_the_teacher(
  student: Network, teacher: Network, images: np.ndarray, devices: int, waits: bool
) -> None:
  """A NaN among the teacher's logits shows in the student's statistics where its images depend on them, and nowhere else."""
  if jax.default_backend() != "cpu":
    pytest.skip("other platforms run a program in one order on all devices")

  def edit(variables: dict) -> None:
    variables["params"]["head"] = jax.tree.map(lambda x: x * jnp.nan, variables["params"]["head"])

  state, _ = one_step(student, damage(teacher, edit), images[:16], CONFIG, devices=devices)
  assert np.isnan(flat(state.student.variables["batch_stats"])).any() == waits


def test_state_does_not_own_the_students_arrays(student: Network, teacher: Network, images: np.ndarray) -> None:
  """A donated state must not take the caller's weights with it."""
  step = jax.jit(functools.partial(_step, CONFIG, axis_name=None), donate_argnums=0)
  before = flat(student.variables)
  step(initial_state(student, CONFIG), jnp.asarray(images[:16]), teacher)
  np.testing.assert_array_equal(flat(student.variables), before)
