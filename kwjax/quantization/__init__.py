"""Quantization: bits of each layer, activation ranges from images, simulated and integer weights."""

from kwjax.quantization.allocate import Allocation, allocate_bits, allocate_from
from kwjax.quantization.bias_correction import correct_bias
from kwjax.quantization.calibrate import calibrate, draws, ranges_from
from kwjax.quantization.equalization import Equalized, Pair, equalize, find_pairs
from kwjax.quantization.extremes import observe_ranges, recording_extremes
from kwjax.quantization.fake_quant import fake_quant
from kwjax.quantization.grids import WEIGHT_SCHEMES, Clip, Grid, activation_grid, weight_grid
from kwjax.quantization.histograms import Histogram, Histograms, observe_histograms
from kwjax.quantization.integer import QTensor, integer_weights
from kwjax.quantization.range_methods import entropy_range, histogram_ranges, mse_range, percentile_range
from kwjax.quantization.ranges import Interval, Ranges, RangeTable
from kwjax.quantization.rules import RANGE_METHODS, WEIGHT_RANGES, Bits, LayerRule, QuantRules
from kwjax.quantization.sensitivity import Sensitivity, measure_sensitivity
from kwjax.quantization.store import load_integer_weights, load_quantized, save_quantized
from kwjax.quantization.weight_ranges import WeightClips, mse_clip, weight_clips
from kwjax.quantization.wrap import QuantizedNetwork, quantize, quantize_inputs, quantize_weights

__all__ = [
  "RANGE_METHODS",
  "WEIGHT_RANGES",
  "WEIGHT_SCHEMES",
  "Allocation",
  "Bits",
  "Clip",
  "Equalized",
  "Grid",
  "Histogram",
  "Histograms",
  "Interval",
  "LayerRule",
  "Pair",
  "QTensor",
  "QuantRules",
  "QuantizedNetwork",
  "RangeTable",
  "Ranges",
  "Sensitivity",
  "WeightClips",
  "activation_grid",
  "allocate_bits",
  "allocate_from",
  "calibrate",
  "correct_bias",
  "draws",
  "entropy_range",
  "equalize",
  "fake_quant",
  "find_pairs",
  "histogram_ranges",
  "integer_weights",
  "load_integer_weights",
  "load_quantized",
  "measure_sensitivity",
  "mse_clip",
  "mse_range",
  "observe_histograms",
  "observe_ranges",
  "percentile_range",
  "quantize",
  "quantize_inputs",
  "quantize_weights",
  "ranges_from",
  "recording_extremes",
  "save_quantized",
  "weight_clips",
  "weight_grid",
]
