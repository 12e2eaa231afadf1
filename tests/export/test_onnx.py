"""ONNX files compute what the simulated network does, in integers, and say what they cannot."""

from __future__ import annotations

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from kwjax.errors import KwjaxError, RuleError
from kwjax.export import export_onnx, onnx_runner
from kwjax.models import (
  CifarResNet,
  DenseNet,
  EfficientNetLite,
  MobileNetV2,
  ResNet,
  WideResNet,
  efficientnet_lite,
  mobilenet,
)
from kwjax.models.resnet import BasicBlock
from kwjax.network import Network
from kwjax.quantization import QuantRules, quantize, ranges_from
from tests.export.networks import Mixed, Scanned, Setup, logits


def rms(difference):
  return float(np.sqrt((np.asarray(difference, np.float64) ** 2).mean()))


def kinds(path):
  return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("module", [Setup(), Mixed(), Scanned()], ids=lambda m: type(m).__name__)
def test_file_is_the_quantized_network_and_not_the_float_one(module, make, make_quantized, images, tmp_path):
  network = make(module)
  float_logits = logits(network, images)
  facts = export_onnx(network, tmp_path / "float.onnx")
  assert facts.float_layers == {} and all("float" in text for text in facts.layers.values())
  np.testing.assert_allclose(onnx_runner(tmp_path / "float.onnx")(images), float_logits, rtol=1e-4, atol=1e-5)

  student = make_quantized(network, "5w5a", "sym")
  simulated = logits(student, images)
  facts = export_onnx(student, tmp_path / "quantized.onnx")
  found = onnx_runner(tmp_path / "quantized.onnx")(images)
  # The grouped convolution, whose padding lies between its rounding and its kernel, is the one that is named.
  assert set(facts.float_layers) <= {"grouped"}
  # Activations at the edge between two levels may fall to either side, in few images.
  assert np.median(np.abs(found - simulated)) < 0.05 * np.median(np.abs(float_logits - simulated))
  counted = kinds(tmp_path / "quantized.onnx")
  assert counted["QuantizeLinear"] == len(facts.layers)
  assert counted["DequantizeLinear"] >= 2 * len(facts.layers)
  assert counted["Clip"] >= len(facts.layers)


@pytest.fixture
def short_stages(monkeypatch):
  monkeypatch.setattr(mobilenet, "_STAGES", ((1, 16, 1, 1), (6, 16, 2, 1)))
  monkeypatch.setattr(efficientnet_lite, "_STAGES", ((3, 1, 1, 16, 1), (5, 2, 6, 24, 1)))


@pytest.mark.parametrize(
  ("module", "size"),
  [
    (CifarResNet(1), 8),
    (ResNet((1, 1, 1, 1), BasicBlock, 10), 32),
    (WideResNet(1, 1, num_classes=10), 8),
    (MobileNetV2(10), 16),
    (EfficientNetLite(10), 16),
    (DenseNet((1, 1, 1, 1), growth=4, num_classes=10), 32),
  ],
  ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_architecture(module, size, short_stages, make, make_quantized, tmp_path):
  images = np.random.default_rng(3).random((8, size, size, 3), np.float32)
  network = make(module, (size, size, 3))
  student = make_quantized(network, "8w8a", "sym")
  facts = export_onnx(student, tmp_path / "net.onnx", form="integer")
  assert facts.float_layers == {} and facts.notes == ()
  assert len(facts.layers) == len(student.ranges)
  found, simulated = onnx_runner(tmp_path / "net.onnx")(images), logits(student, images)
  assert np.median(np.abs(found - simulated)) < 0.02 * simulated.std()


def test_batch_norm_is_folded_and_integers_run_end_to_end(make, make_quantized, tmp_path):
  student = make_quantized(make(Setup()), "8w8a", "symfull")
  export_onnx(student, tmp_path / "net.onnx")
  counted = kinds(tmp_path / "net.onnx")
  # The normalisation alone multiplies or adds.
  assert counted["Mul"] + counted["BatchNormalization"] == 0 and counted["Add"] == counted["Div"] == 1
  onnxruntime = pytest.importorskip("onnxruntime")
  options = onnxruntime.SessionOptions()
  options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
  onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
  optimized = kinds(tmp_path / "optimized.onnx")
  assert optimized["QLinearConv"] == 1 and optimized["QGemm"] == 2


@pytest.mark.parametrize(("opset", "bits", "kind"), [(13, "4w8a", "INT8"), (21, "4w8a", "INT4"), (20, "8w8a", "UINT8")])
def test_types_of_the_kernels(opset, bits, kind, make, make_quantized, images, tmp_path):
  student = make_quantized(make(Setup()), bits, "affine0")
  facts = export_onnx(student, tmp_path / "net.onnx", opset=opset, layout="nchw", batch=24)
  graph = onnx.load(tmp_path / "net.onnx").graph
  found = {onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer if t.name.endswith("kernel_q")}
  assert found == {kind}
  assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [24, 3, 8, 8]
  assert any("int4" in note for note in facts.notes) == (kind == "INT4")
  assert np.median(np.abs(onnx_runner(tmp_path / "net.onnx")(images) - logits(student, images))) < 0.005


def test_weights_without_integers_are_refused_by_name_or_listed(make, make_quantized, images, tmp_path):
  student = make_quantized(make(Setup()), "4w4a", "auto")
  with pytest.raises(RuleError, match=r"features/layers_0 \(and 3 more layers\).*--weight-scheme affine0"):
    export_onnx(student, tmp_path / "net.onnx")
  assert not (tmp_path / "net.onnx").exists()
  facts = export_onnx(student, tmp_path / "net.onnx", allow_float_weights=True)
  assert len(facts.float_layers) == 4 and "real zero point" in facts.float_layers["features/layers_0"]
  assert np.median(np.abs(onnx_runner(tmp_path / "net.onnx")(images) - logits(student, images))) < 1e-5


class Cumulative(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Dense(3, name="head")(jnp.cumsum(x.mean((1, 2)), axis=1))


def test_what_has_no_counterpart_is_named(make, tmp_path):
  with pytest.raises(KwjaxError, match="Cumulative: the operation cumsum cannot be exported"):
    export_onnx(make(Cumulative()), tmp_path / "net.onnx")


@pytest.mark.parametrize(
  ("options", "message"),
  [({"opset": 9}, "opset must be 13 to 23, found 9"), ({"form": "x"}, "form must be"), ({"batch": 0}, "batch must be")],
)
def test_arguments_are_checked(options, message, make, tmp_path):
  with pytest.raises(KwjaxError, match=message):
    export_onnx(make(Setup()), tmp_path / "net.onnx", **options)


@pytest.mark.slow
def test_resnet20_has_the_top1_of_the_simulated_network(shared_data, tmp_path):
  from kwjax.quantization import observe_ranges
  from weights_conversion.convert import convert

  network: Network = convert("resnet20", shared_data / "weights" / "resnet20-12fca82f.th")
  data = np.load(shared_data / "cifar10" / "cifar10_subset.npz")
  train, test = (data[key].astype(np.float32) / 255 for key in ("train_images", "test_images"))
  rules = QuantRules.parse("8w8a", weights="sym")
  table = observe_ranges(network, train[:64])
  student = quantize(network, rules, ranges_from(table, rules, key=jax.random.key(0)))
  export_onnx(student, tmp_path / "net.onnx")
  run = onnx_runner(tmp_path / "net.onnx", session_options={})
  batches = [test[i : i + 339] for i in range(0, len(test), 339)]
  apply = jax.jit(lambda found, x: found.apply(x))
  found = np.concatenate([run(batch) for batch in batches])
  simulated = np.concatenate([apply(student, batch) for batch in batches])
  right = [int((v.argmax(1) == data["test_labels"]).sum()) for v in (found, simulated)]
  assert abs(right[0] - right[1]) <= 1
  assert (found.argmax(1) == simulated.argmax(1)).mean() > 0.995
  assert rms(found - simulated) < 0.01 * rms(simulated)
