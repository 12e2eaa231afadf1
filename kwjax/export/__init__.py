"""Files for other runtimes: ONNX, StableHLO and safetensors, of quantized and float networks."""

from kwjax.export.onnx_file import OnnxFacts, export_onnx
from kwjax.export.stablehlo import StablehloFacts, StablehloNetwork, export_stablehlo, load_stablehlo
from kwjax.export.tensors import IntegerNetwork, export_safetensors, load_safetensors
from kwjax.export.verify import Comparison, compare, onnx_runner

__all__ = [
  "Comparison",
  "IntegerNetwork",
  "OnnxFacts",
  "StablehloFacts",
  "StablehloNetwork",
  "compare",
  "export_onnx",
  "export_safetensors",
  "export_stablehlo",
  "load_safetensors",
  "load_stablehlo",
  "onnx_runner",
]
