"""Compress trained neural networks without their training data.

`compress` does all of it in one call. The stages, in the order in which data goes through them: a `Network`; the statistics
of its BatchNorm layers (`observe`, `reference_moments`, `bns_loss`, `measure`); images made out of it (`synthesize`); low
precision (`calibrate`, `quantize`, `reconstruct`, `integer_weights`); fine-tuning (`distill`); how good the student is
(`evaluate`, `agreement`).
"""

import importlib.metadata as _metadata

from kwjax.analysis.attacks import fgsm, fgsm_images
from kwjax.analysis.divergence_scores import ScoreReference, divergence_scores, fit_scores, image_divergences
from kwjax.analysis.roc import auroc, auroc_interval, max_softmax
from kwjax.analysis.similarity import Similarity, measure
from kwjax.batchnorm import (
  Moments,
  adjust_statistics,
  bns_loss,
  current_layers,
  gaussian_kl,
  observe,
  reference_moments,
)
from kwjax.compression import Compressed, Decision, FineTuning, compress
from kwjax.distillation import DistillConfig, distill, distill_step
from kwjax.errors import KwjaxError
from kwjax.export import export_onnx, export_safetensors, export_stablehlo, load_safetensors, load_stablehlo
from kwjax.models import get_model, known_models, model_info
from kwjax.network import Network, load_network, save_network
from kwjax.quantization import (
  Allocation,
  QTensor,
  QuantizedNetwork,
  QuantRules,
  Ranges,
  allocate_bits,
  calibrate,
  correct_bias,
  equalize,
  fake_quant,
  integer_weights,
  load_quantized,
  quantize,
  save_quantized,
)
from kwjax.reconstruction import ReconstructConfig, reconstruct
from kwjax.runtime.data import load_data
from kwjax.runtime.evaluate import Accuracy, Agreement, agreement, evaluate
from kwjax.sources import Batch, FixedSet, FreshNoise, Pixels, Source
from kwjax.synthesis import (
  Augmentation,
  Objective,
  SampleSet,
  SynthesisConfig,
  dead_leaves,
  gaussian_images,
  save_tfds,
  synthesis_loss,
  synthesis_step,
  synthesize,
)

try:
  __version__ = _metadata.version("kwjax")
except _metadata.PackageNotFoundError:  # a source folder on the path, not installed
  __version__ = "0+unknown"

__all__ = [
  "Accuracy",
  "Agreement",
  "Allocation",
  "Augmentation",
  "Batch",
  "Compressed",
  "Decision",
  "DistillConfig",
  "FineTuning",
  "FixedSet",
  "FreshNoise",
  "KwjaxError",
  "Moments",
  "Network",
  "Objective",
  "Pixels",
  "QTensor",
  "QuantRules",
  "QuantizedNetwork",
  "Ranges",
  "ReconstructConfig",
  "SampleSet",
  "ScoreReference",
  "Similarity",
  "Source",
  "SynthesisConfig",
  "adjust_statistics",
  "agreement",
  "allocate_bits",
  "auroc",
  "auroc_interval",
  "bns_loss",
  "calibrate",
  "compress",
  "correct_bias",
  "current_layers",
  "dead_leaves",
  "distill",
  "distill_step",
  "divergence_scores",
  "equalize",
  "evaluate",
  "export_onnx",
  "export_safetensors",
  "export_stablehlo",
  "fake_quant",
  "fgsm",
  "fgsm_images",
  "fit_scores",
  "gaussian_images",
  "gaussian_kl",
  "get_model",
  "image_divergences",
  "integer_weights",
  "known_models",
  "load_data",
  "load_network",
  "load_quantized",
  "load_safetensors",
  "load_stablehlo",
  "max_softmax",
  "measure",
  "model_info",
  "observe",
  "quantize",
  "reconstruct",
  "reference_moments",
  "save_network",
  "save_quantized",
  "save_tfds",
  "synthesis_loss",
  "synthesis_step",
  "synthesize",
]
