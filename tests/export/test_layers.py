"""Kernels keep their values through folding, refining and storing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kwjax.export.graph import Weight
from kwjax.export.onnx_layers import Form, Kernel, folded, refined, stored


def dequantized(kernel: Kernel) -> np.ndarray:
  return (kernel.q - kernel.zero[:, None]) * kernel.scale[:, None].astype(np.float64)


def a_kernel(low: int, high: int, zero: int = 0) -> Kernel:
  q = np.random.default_rng(0).integers(low, high + 1, (6, 40))
  q[:, 0], q[:, 1] = low, high
  return Kernel(q.astype(np.int32), np.full(6, zero, np.int32), np.linspace(0.01, 0.02, 6, dtype=np.float32))


@pytest.mark.parametrize(
  "kernel", [a_kernel(-128, 127), a_kernel(-7, 7), a_kernel(-128, 127, zero=-100)], ids=("full", "narrow", "shifted")
)
def test_folding_multiplies_each_channel(kernel):
  factor = np.array([1.0, -1.0, 0.5, -0.25, 0.0, 3.0])
  found = folded(kernel, factor)
  assert found is not None and (found.scale > 0).all()
  assert found.q.min() >= -128 and found.q.max() <= 127
  np.testing.assert_allclose(dequantized(found), dequantized(kernel) * factor[:, None], rtol=1e-6)


def test_a_factor_beyond_float32_is_not_folded():
  assert folded(a_kernel(-7, 7), np.full(6, 1e-38)) is None


@pytest.mark.parametrize(("largest", "factor"), [(255, 8), (15, 16)])
def test_refining_keeps_values_within_the_products_that_16_bits_hold(largest, factor):
  kernel = a_kernel(-7, 7)
  found = refined(kernel, largest, Form(False, False, False))
  np.testing.assert_array_equal(dequantized(found), dequantized(kernel))
  assert np.abs(found.q).max() == 7 * factor
  assert 2 * largest * np.abs(found.q).max() <= 32767


@pytest.mark.parametrize(
  ("kernel", "bits", "form", "largest", "kind"),
  [
    (a_kernel(-127, 127), 8, Form(False, False, False), 255, np.uint8),
    (a_kernel(-127, 127), 8, Form(False, False, False), 15, np.int8),
    (a_kernel(-127, 127), 8, Form(False, True, False), 255, np.int8),
    (a_kernel(-7, 7), 4, Form(False, False, False), 255, np.int8),
    (a_kernel(-7, 7), 4, Form(False, False, True), 255, ml_dtypes.int4),
    (a_kernel(-3, 12), 4, Form(False, False, True), 255, ml_dtypes.int4),
    (a_kernel(-15, 0), 4, Form(False, False, True), 255, ml_dtypes.int4),
  ],
  ids=("uint8", "int8", "forced", "few bits", "int4", "unsigned", "negative"),
)
def test_storing_keeps_the_differences(kernel, bits, form, largest, kind):
  q, zero = stored(kernel, Weight("layer", np.zeros(1), None, "", bits), largest, form)
  assert q.dtype == zero.dtype == kind
  np.testing.assert_array_equal(q.astype(int) - zero.astype(int)[:, None], kernel.q - kernel.zero[:, None])
