"""The quantized forward pass: against NumPy arithmetic, under scan and remat, with observation, and its gradients."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax import intercept
from kwjax.batchnorm import observe, observing, recorded_moments
from kwjax.errors import KwjaxError, RuleError
from kwjax.quantization import QuantRules, Ranges, calibrate, quantize, quantize_inputs, quantize_weights

RULES = QuantRules.parse("4w4a", first_last="8w8a")


@pytest.fixture(scope="module")
def ranges(network, images):
  return calibrate(network, images, RULES, key=jax.random.key(0), steps=2, batch_size=16)


def numpy_affine(x, lo, hi, bits, *, integer_zero):
  n = 2**bits - 1
  scale = np.float32((np.float32(hi) - np.float32(lo)) / np.float32(n))
  zero = np.float32(-lo) / scale
  zero = np.round(zero) if integer_zero else zero
  return ((np.clip(np.round(x / scale + zero), 0, n) - zero) * scale).astype(np.float32)


def test_matches_a_numpy_forward_pass(make_network):
  class OneByOne(nn.Module):
    """Two 1x1 convolutions are matrix products, so NumPy can follow."""

    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.Conv(7, (1, 1), name="a")(x))
      return nn.Dense(4, name="b")(x.reshape(x.shape[0], -1))

  network = make_network(OneByOne(), (2, 2, 3))
  images = jax.random.uniform(jax.random.key(1), (5, 2, 2, 3))
  rules = QuantRules.parse("4w3a", overrides={"last": "2w5a"})
  given = Ranges({"a": (-1.7, 1.9), "b": (0.3, 2.0)})
  found = jax.jit(quantize(network, rules, given).apply)(images)

  params = jax.tree.map(np.asarray, network.variables["params"])
  x = (np.asarray(images) - np.float32(0.45)) / np.float32(0.25)
  x = numpy_affine(x, -1.7, 1.9, 3, integer_zero=True)
  a = params["a"]["kernel"][0, 0]
  a = np.stack([numpy_affine(a[:, c], a[:, c].min(), a[:, c].max(), 4, integer_zero=False) for c in range(7)], -1)
  x = np.maximum(x @ a + params["a"]["bias"], 0).reshape(5, -1)
  # The range of b is extended to include 0; 2 bit weights read as levels -2..1 of half the largest.
  x = numpy_affine(x, 0.0, 2.0, 5, integer_zero=True)
  b = params["b"]["kernel"]
  step = np.abs(b).max(0) / 2
  b = np.clip(np.round(b / step), -2, 1) * step
  np.testing.assert_allclose(found, x @ b + params["b"]["bias"], rtol=2e-5, atol=2e-5)


def test_float_rules_change_nothing(network, images):
  plain = quantize(network, QuantRules.parse("float"), Ranges({}))
  np.testing.assert_array_equal(plain.apply(images), network.apply(images))


def test_more_bits_come_closer_to_float(network, images, ranges):
  errors = [
    float(
      jnp.abs(quantize(network, QuantRules.parse(f"{b}w{b}a"), ranges).apply(images) - network.apply(images)).mean()
    )
    for b in (2, 4, 8)
  ]
  assert errors[0] > 2 * errors[1] > 8 * errors[2] > 0


@pytest.mark.parametrize("weights", ["auto", "sym"])
def test_scan_and_remat_equal_the_unrolled_network(stacked_networks, weights):
  images = jax.random.uniform(jax.random.key(2), (4, 6, 6, 6))
  rules = QuantRules.parse("3w4a", first_last="8w8a", weights=weights)
  calibrated = {
    form: calibrate(net, images, rules, key=jax.random.key(0), steps=1, batch_size=16)
    for form, net in stacked_networks.items()
  }
  assert calibrated["scan"]["blocks/conv"].lo.shape == (3,)
  for i in range(3):
    for end in range(2):
      expected = calibrated["unrolled"][f"block{i}/conv"][end]
      np.testing.assert_allclose(calibrated["scan"]["blocks/conv"][end][i], expected, rtol=1e-5, atol=1e-6)

  # The same ranges for every form: a last digit of difference may move a value over the edge of a level.
  unrolled = calibrated["unrolled"]
  stack = lambda end: jnp.stack([unrolled[f"block{i}/conv"][end] for i in range(3)])
  given = {
    "unrolled": unrolled,
    "remat": unrolled,
    "scan": Ranges({"stem": unrolled["stem"], "blocks/conv": (stack(0), stack(1)), "head": unrolled["head"]}),
  }
  outputs, gradients = {}, {}
  for form, net in stacked_networks.items():
    student = quantize(net, rules, given[form])
    loss = lambda params, student=student: jnp.sum(
      jnp.sin(student.forward({**student.variables, "params": params}, images)[0])
    )
    outputs[form] = jax.jit(student.apply)(images)
    gradients[form] = jax.jit(jax.grad(loss))(net.variables["params"])
  assert float(jnp.abs(outputs["unrolled"] - stacked_networks["unrolled"].apply(images)).max()) > 1e-2
  for form in ("remat", "scan"):
    np.testing.assert_allclose(outputs[form], outputs["unrolled"], rtol=1e-4, atol=1e-5)
  for i in range(3):
    expected = gradients["unrolled"][f"block{i}"]["conv"]["kernel"]
    for found in (gradients["remat"][f"block{i}"]["conv"]["kernel"], gradients["scan"]["blocks"]["conv"]["kernel"][i]):
      np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_scan_that_keeps_ranges_out_is_an_error_and_not_a_float_layer(make_network):
  class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return nn.relu(nn.Conv(3, (1, 1), name="conv")(x)), None

  class Closed(nn.Module):
    @nn.compact
    def __call__(self, x):
      x, _ = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="body")(x, None)
      return nn.Dense(2, name="head")(x.mean((1, 2)))

  network = make_network(Closed(), (4, 4, 3))
  given = Ranges({"body/conv": (jnp.zeros(2), jnp.ones(2)), "head": (0.0, 1.0)})
  with pytest.raises(KwjaxError, match=r"activation range of layer body/conv does not reach it"):
    quantize(network, QuantRules.parse("4w4a"), given).apply(jnp.ones((1, 4, 4, 3)))


def test_composes_with_observation(network, images, ranges):
  """BatchNorm moments of the quantized forward pass are those of a network that holds the quantized kernel itself."""
  student = quantize(network, QuantRules.parse("2w8a"), ranges)
  logits, moments = observe(student, images)
  np.testing.assert_array_equal(logits, student.apply(images))
  assert list(moments) == ["stem_bn", "depthwise_bn", "pointwise_bn"]

  captured = {}

  def keep(variables, x):
    captured.update(variables["params"])
    return network.forward(variables, x)

  quantize_weights(keep, network, student.rules)(network.variables, images)
  kernel, bias = captured["stem"]["kernel"], captured["stem"]["bias"]
  x = (images - 0.45) / 0.25
  lo, hi = (np.asarray(v) for v in ranges["stem"])
  x = numpy_affine(np.asarray(x), lo, hi, 8, integer_zero=True)
  y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias
  np.testing.assert_allclose(moments["stem_bn"].mean, y.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(moments["stem_bn"].var, y.var((0, 1, 2)), rtol=1e-4, atol=1e-5)
  float_moments = observe(network, images)[1]
  assert float(jnp.abs(float_moments["stem_bn"].mean - moments["stem_bn"].mean).max()) > 1e-3

  # Observation outside or inside the quantization wrappers: the same numbers.
  inside = quantize_weights(
    quantize_inputs(observing(network.forward), network, student.rules, ranges), network, student.rules
  )
  again = recorded_moments(inside(network.variables, images)[1])
  for name in moments:
    np.testing.assert_array_equal(again[name].var, moments[name].var)


def test_gradient_reaches_float_weights_images_and_not_ranges(network, images, ranges):
  student = quantize(network, RULES, ranges)

  def loss(student, images):
    return jnp.sum(jnp.square(student.apply(images)))

  gradient, image_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(student, images)
  for name in ("stem", "depthwise", "pointwise", "classifier"):
    assert float(jnp.abs(gradient.network.variables["params"][name]["kernel"]).max()) > 0, name
  assert float(jnp.abs(image_gradient).max()) > 0
  for leaf in jax.tree.leaves(gradient.ranges):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_straight_through_gradient_is_the_float_gradient_at_the_quantized_point(network, images):
  """With float activations and affine weights nothing is clipped: dL/dw equals dL/dq at q = Q(w)."""
  rules = QuantRules.parse("3w32a", weights="affine")
  student = quantize(network, rules, Ranges({}))
  quantized_params = {}

  def keep(variables, x):
    quantized_params.update(variables["params"])
    return network.forward(variables, x)

  quantize_weights(keep, network, rules)(network.variables, images)
  stats = network.variables["batch_stats"]
  loss = lambda forward, params: jnp.sum(jnp.sin(forward({"params": params, "batch_stats": stats}, images)[0]))
  found = jax.grad(lambda p: loss(student.forward, p))(network.variables["params"])
  expected = jax.grad(lambda p: loss(network.forward, p))(dict(quantized_params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_weights_follow_the_variables(network, images, ranges):
  student = quantize(network, RULES, ranges)
  doubled = jax.tree.map(lambda v: v, dict(network.variables))
  doubled["params"] = {
    **doubled["params"],
    "classifier": jax.tree.map(lambda v: 2 * v, doubled["params"]["classifier"]),
  }
  np.testing.assert_allclose(student.replace(variables=doubled).apply(images), 2 * student.apply(images), rtol=1e-6)


def test_is_a_pytree_and_looks_like_a_network(network, images, ranges):
  student = quantize(network, RULES, ranges)
  logits = student.apply(images)
  np.testing.assert_allclose(jax.jit(lambda s, x: s.apply(x))(student, images), logits, rtol=1e-5, atol=1e-5)
  again = jax.tree.unflatten(*reversed(jax.tree.flatten(student)))
  assert again.rules == RULES
  assert list(again.ranges) == ["stem", "depthwise", "pointwise", "classifier"]
  assert (student.name, student.num_classes, student.image_shape) == ("tiny 4w4a", 5, (8, 8, 3))
  assert (student.input_mean, student.input_std) == (network.input_mean, network.input_std)
  assert student.variables is network.variables
  renamed = student.replace(name="other", rules=QuantRules.parse("8w8a"))
  assert renamed.name == "other 8w8a"


def test_kernels_with_other_channel_axes(make_network):
  class Odd(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.ConvTranspose(4, (2, 2), transpose_kernel=True, name="up")(x)
      x = nn.DenseGeneral((2, 3), name="heads")(x)
      return nn.DenseGeneral(5, axis=(-2, -1), name="merge")(x).mean((1, 2))

  network = make_network(Odd(), (3, 3, 3))
  shapes = {layer.name: layer.kernel_shape for layer in intercept.matmul_layers(network)}
  assert shapes == {"up": (2, 2, 4, 3), "heads": (4, 2, 3), "merge": (2, 3, 5)}
  captured = {}

  def keep(variables, x):
    captured.update(variables["params"])
    return network.forward(variables, x)

  quantize_weights(keep, network, QuantRules.parse("8w32a", weights="sym"))(network.variables, jnp.ones((1, 3, 3, 3)))
  for name, axes in {"up": (0, 1, 3), "heads": (0,), "merge": (0, 1)}.items():
    kernel, found = (np.asarray(params[name]["kernel"]) for params in (network.variables["params"], captured))
    scale = np.abs(kernel).max(axes, keepdims=True) / 127
    np.testing.assert_allclose(found, np.round(kernel / scale) * scale, rtol=1e-5, atol=1e-7)


def test_kernels_stacked_along_another_axis_are_refused(make_network):
  class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return nn.Dense(4, name="dense")(x), None

  class Sideways(nn.Module):
    @nn.compact
    def __call__(self, x):
      body = nn.scan(Body, variable_axes={"params": 1, "batch_stats": 0}, split_rngs={"params": True}, length=3)
      x, _ = body(name="body")(x, None)
      return x.mean((1, 2))

  network = make_network(Sideways(), (3, 3, 4))
  with pytest.raises(RuleError, match=r"body/dense has shape \(4, 3, 4\), expected \(4, 4\)"):
    quantize_weights(network.forward, network, QuantRules.parse("4w32a"))(network.variables, jnp.ones((1, 3, 3, 4)))


def test_bad_ranges_are_refused_by_layer(network, stacked_networks, ranges):
  some = Ranges({name: interval for name, interval in ranges.items() if name != "depthwise"})
  with pytest.raises(KwjaxError, match="no calibrated range for 1 of 4 layers of tiny: depthwise"):
    quantize(network, RULES, some)
  quantize(network, QuantRules.parse("4w4a", overrides={"depthwise": "4w32a"}), some)
  for bad in ((1.0, 0.0), (0.0, float("nan")), (-float("inf"), 1.0)):
    with pytest.raises(KwjaxError, match="range of layer stem must be finite"):
      quantize(network, RULES, Ranges({**ranges, "stem": bad}))
  with pytest.raises(KwjaxError, match="range of layer stem needs 1 pairs"):
    quantize(network, RULES, Ranges({**ranges, "stem": (jnp.zeros(3), jnp.ones(3))}))
  with pytest.raises(KwjaxError, match="range of layer blocks/conv needs 3 pairs"):
    quantize(stacked_networks["scan"], RULES, Ranges({"stem": (0, 1), "blocks/conv": (0, 1), "head": (0, 1)}))
