"""Every stage on modules written the way others write them: each property against arithmetic that knows nothing of kwjax."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kwjax
from kwjax.distillation import distill_with_history
from kwjax.intercept import matmul_layers
from kwjax.quantization import draws
from kwjax.runtime.evaluate import predict
from tests.foreign.conftest import Style, batch_norm_inputs

pytestmark = pytest.mark.slow
RULES = kwjax.QuantRules.parse("8w8a", ranges="chunk")


@pytest.fixture(scope="module")
def ranges(style: Style) -> kwjax.Ranges:
  return kwjax.calibrate(style.network, style.images, RULES, key=jax.random.key(1), steps=4, batch_size=16)


def test_observed_moments_are_those_of_the_inputs(style: Style) -> None:
  logits, measured = jax.jit(kwjax.observe)(style.network, style.images)
  apply = functools.partial(style.network.module.apply, **style.evaluation)
  expected = jax.jit(apply)(style.network.variables, style.module_input)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  inputs = batch_norm_inputs(style)
  assert set(measured) == set(inputs) == set(kwjax.reference_moments(style.network))
  for layer, values in inputs.items():
    np.testing.assert_allclose(measured[layer].mean, values.mean(0), rtol=1e-3, atol=1e-4, err_msg=layer)
    np.testing.assert_allclose(measured[layer].var, values.var(0), rtol=2e-3, atol=1e-5, err_msg=layer)


def test_synthesis_lowers_the_divergence(style: Style) -> None:
  config = kwjax.SynthesisConfig.for_network("bns", 8)
  config = config.replace(steps=3, batch_size=8, init="uniform", augmentation=kwjax.Augmentation())
  samples = kwjax.synthesize(style.network, config, num_images=8, key=jax.random.key(0))
  assert samples.images.shape == (8, *style.network.image_shape)
  assert 0.0 <= samples.images.min() < samples.images.max() <= 1.0
  bns = samples.history["bns"][0]
  assert bns[0] > bns[1] > bns[2] > 0.0


PASSED_ON = {"convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim"}


def products(jaxpr: Any, given: Sequence[bool]) -> list[tuple[bool, bool]]:
  """Of every convolution and matrix product of a program: whether its input, and its kernel, were rounded just before.

  Args:
    jaxpr: the program; those inside of scan, remat and jit are followed.
    given: whether each of its inputs was rounded.
  """
  rounded = {id(variable) for variable, known in zip(jaxpr.invars, given, strict=True) if known}
  found = []
  for equation in jaxpr.eqns:
    name, known = equation.primitive.name, [id(variable) in rounded for variable in equation.invars]
    inner = equation.params.get("jaxpr")
    if name in ("conv_general_dilated", "dot_general"):
      found.append((known[0], known[1]))
    elif name == "custom_vjp_call" or (
      name in PASSED_ON and known[0]
    ):  # rounding is the only one with its own gradient
      rounded |= {id(variable) for variable in equation.outvars}
    elif inner is not None:
      found += products(getattr(inner, "jaxpr", inner), known)
  return found


def test_every_kernel_is_quantized_and_its_input(style: Style, ranges: kwjax.Ranges) -> None:
  assert set(ranges) == set(style.kernels) == set(RULES.resolve(style.network))
  student = kwjax.quantize(style.network, RULES, ranges)
  for network, expected in ((student, True), (style.network, False)):
    program = jax.make_jaxpr(network.apply)(style.images).jaxpr
    # Stacked layers are one product inside of their scan, and one kernel.
    assert products(program, [False] * len(program.invars)) == [(expected, expected)] * len(style.kernels)


def test_calibrated_ranges_are_the_mean_extremes_of_the_chunks(style: Style, ranges: kwjax.Ranges) -> None:
  first = next(iter(matmul_layers(style.network))).name
  pixels = np.asarray(style.module_input)[draws(jax.random.key(1), steps=4, batch_size=16, count=8).reshape(4, 16)]
  np.testing.assert_allclose(ranges[first].lo, pixels.min((1, 2, 3, 4)).mean(), rtol=1e-5)
  np.testing.assert_allclose(ranges[first].hi, pixels.max((1, 2, 3, 4)).mean(), rtol=1e-5)


def test_eight_bits_stay_close_and_differ(style: Style, ranges: kwjax.Ranges, tmp_path: pathlib.Path) -> None:
  student = kwjax.quantize(style.network, RULES, ranges)
  found = kwjax.agreement(student, style.network, style.images)
  assert found.top1 >= 7 / 8
  assert (
    20.0 < found.sqnr_db < 60.0
  )  # 8 bits give some 40 dB, less what the calibrated range cuts off; equal would be infinite
  logits = predict(student, style.images)
  labels = np.argmax(logits, -1)
  assert kwjax.evaluate(student, style.images, labels).top1 == 1.0
  kwjax.save_quantized(student, tmp_path)
  loaded = kwjax.load_quantized(tmp_path, module=style.network.module)
  np.testing.assert_array_equal(predict(loaded, style.images), logits)


def test_distillation_moves_every_kernel_and_lowers_the_loss(style: Style, ranges: kwjax.Ranges) -> None:
  student = kwjax.quantize(style.network, kwjax.QuantRules.parse("3w4a"), ranges)
  settings = kwjax.DistillConfig.preset("short", steps=3, batch_size=8, log_every=1, iq_weight=1e-2)
  settings = settings.replace(batch_norm="frozen", learning_rate=0.02)
  tuned, history = distill_with_history(student, style.network, style.images, settings, key=jax.random.key(2))
  assert history[-1]["loss"] < history[0]["loss"]
  assert history[0]["iq"] > 0.0, "no stage was found to compare"
  moved = Style(tuned.network, style.evaluation, style.images).kernels
  for layer, kernel in style.kernels.items():
    assert float(jnp.abs(moved[layer] - kernel).max()) > 0.0, layer
