"""Low precision: which layer gets how many bits, activation ranges from images, simulated and integer weights."""

from kwjax.quantization.calibrate import calibrate, draws, observe_ranges, ranges_from, recording_extremes
from kwjax.quantization.fake_quant import fake_quant
from kwjax.quantization.grids import WEIGHT_READINGS, Grid, activation_grid, weight_grid
from kwjax.quantization.integer import QTensor, integer_weights
from kwjax.quantization.ranges import Interval, Ranges, RangeTable
from kwjax.quantization.rules import RANGE_READINGS, Bits, LayerRule, QuantRules
from kwjax.quantization.store import load_integer_weights, load_quantized, save_quantized
from kwjax.quantization.wrap import QuantizedNetwork, quantize, quantize_inputs, quantize_weights

__all__ = [
  "RANGE_READINGS",
  "WEIGHT_READINGS",
  "Bits",
  "Grid",
  "Interval",
  "LayerRule",
  "QTensor",
  "QuantRules",
  "QuantizedNetwork",
  "RangeTable",
  "Ranges",
  "activation_grid",
  "calibrate",
  "draws",
  "fake_quant",
  "integer_weights",
  "load_integer_weights",
  "load_quantized",
  "observe_ranges",
  "quantize",
  "quantize_inputs",
  "quantize_weights",
  "ranges_from",
  "recording_extremes",
  "save_quantized",
  "weight_grid",
]
