"""Integer weights equal the kernels that the quantized forward pass uses, and schemes without integers are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.errors import RuleError
from kwjax.quantization import QuantRules, Ranges, integer_weights, quantize, quantize_weights


def used_kernels(network, rules, images):
  """Kernels that the forward pass sees, taken out of a jitted call."""

  def keep(variables, x):
    return network.forward(variables, x)[0], variables["params"]

  return jax.jit(lambda v, x: quantize_weights(keep, network, rules)(v, x)[1])(network.variables, images)


CASES = [(w, b) for w in ("sym", "symfull", "affine0", "midrise") for b in range(2, 9) if (w, b) != ("midrise", 8)]


@pytest.mark.parametrize(("weights", "bits"), CASES)
def test_dequantizes_bit_equal(network, images, weights, bits):
  rules = QuantRules.parse(f"{bits}w32a", weights=weights)
  found = integer_weights(quantize(network, rules, Ranges({})))
  kernels = used_kernels(network, rules, images)
  assert list(found) == ["stem", "depthwise", "pointwise", "classifier"]
  for name, tensor in found.items():
    assert (tensor.q.dtype, tensor.zero.dtype, tensor.scale.dtype) == (jnp.int8, jnp.int32, jnp.float32)
    assert float(tensor.scale.min()) > 0
    # + 0.0 turns a negative zero, which integers do not have, into a zero.
    expected = np.asarray(kernels[name]["kernel"]) + np.float32(0)
    np.testing.assert_array_equal(np.asarray(tensor.dequantize()).view(np.int32), expected.view(np.int32), err_msg=name)
    # Independent of `dequantize`: int32 arithmetic, one float32 product.
    q, zero = np.asarray(tensor.q, np.int32), np.asarray(tensor.zero)
    np.testing.assert_array_equal((q - zero).astype(np.float32) * np.asarray(tensor.scale), expected)
    assert int(q.max()) - int(q.min()) <= (2 if weights == "midrise" else 1) * (2**bits - 1)


def test_stacked_kernels_equal_the_unrolled_ones(stacked_networks):
  rules = QuantRules.parse("4w32a", weights="affine0")
  found = {form: integer_weights(quantize(net, rules, Ranges({}))) for form, net in stacked_networks.items()}
  for i in range(3):
    for field in ("q", "scale", "zero"):
      stacked, single = (getattr(t, field) for t in (found["scan"]["blocks/conv"], found["unrolled"][f"block{i}/conv"]))
      np.testing.assert_array_equal(stacked[i], single)


def test_two_bit_midrise_is_odd_integers(network):
  tensor = integer_weights(quantize(network, QuantRules.parse("2w32a", weights="midrise"), Ranges({})))["stem"]
  assert set(np.unique(tensor.q)) == {-3, -1, 1, 3}
  kernel = np.asarray(network.variables["params"]["stem"]["kernel"])
  np.testing.assert_allclose(tensor.scale[0, 0, 0], np.abs(kernel).max((0, 1, 2)) / 3, rtol=1e-6)


def test_float_layers_are_left_out(network):
  rules = QuantRules.parse("4w32a", weights="sym", overrides={"first": "float"})
  assert list(integer_weights(quantize(network, rules, Ranges({})))) == ["depthwise", "pointwise", "classifier"]


def test_schemes_without_integers_are_refused_by_layer_and_name(network):
  with pytest.raises(RuleError, match=r"layer stem .*'affine' has a real zero point"):
    integer_weights(quantize(network, QuantRules.parse("4w32a"), Ranges({})))
  rules = QuantRules.parse("4w32a", weights="midrise", overrides={"last": "8w32a"})
  with pytest.raises(RuleError, match=r"layer classifier .*'midrise' at 8 bits"):
    integer_weights(quantize(network, rules, Ranges({})))
