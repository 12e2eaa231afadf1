"""Statistics of BatchNorm inputs: measure them, compare them, choose which ones a layer uses."""

from kwjax.batchnorm.adjust import adjust_statistics, current_layers, with_statistics
from kwjax.batchnorm.divergence import (
  DIVERGENCES,
  OUTLIER_NATS,
  bns_loss,
  gaussian_kl,
  layer_divergence,
  moment_l2,
  moment_mse,
  std_mse,
  trimmed_jkl,
)
from kwjax.batchnorm.moments import Moments, Pooled, batch_moments, merge, over_devices, pool
from kwjax.batchnorm.observe import (
  INPUT,
  entry_weights,
  freeze,
  input_moments,
  matches,
  observe,
  observing,
  recorded_moments,
  reference_moments,
  weigh,
)

__all__ = [
  "DIVERGENCES",
  "INPUT",
  "OUTLIER_NATS",
  "Moments",
  "Pooled",
  "adjust_statistics",
  "batch_moments",
  "bns_loss",
  "current_layers",
  "entry_weights",
  "freeze",
  "gaussian_kl",
  "input_moments",
  "layer_divergence",
  "matches",
  "merge",
  "moment_l2",
  "moment_mse",
  "observe",
  "observing",
  "over_devices",
  "pool",
  "recorded_moments",
  "reference_moments",
  "std_mse",
  "trimmed_jkl",
  "weigh",
  "with_statistics",
]
