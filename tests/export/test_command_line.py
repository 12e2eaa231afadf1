"""The export command writes checked files, and refuses what it cannot in one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.export import main
from kwjax.models import CifarResNet
from kwjax.network import save_network
from kwjax.quantization import save_quantized


@pytest.fixture(scope="module")
def workdir(make, make_quantized, images, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  network = make(CifarResNet(1)).replace(arch="resnet20", model_options={"blocks_per_stage": 1})
  save_quantized(make_quantized(network, "8w8a", "sym"), folder / "quantized")
  labels = np.arange(len(images)) % 10
  np.savez(folder / "data.npz", images=(255 * images).astype(np.uint8), labels=labels)
  return folder


def test_onnx_of_a_run_with_labelled_images(workdir, capsys):
  arguments = ["--format", "onnx", "--run", str(workdir), "--form", "integer", "--eval-data", str(workdir / "data.npz")]
  assert main([*arguments, "--images", "8"]) == 0
  report = json.loads(capsys.readouterr().out)
  assert (workdir / "export" / "tiny-8w8a.onnx").stat().st_size == report["size"]
  assert report["comparison"]["images"] == 8 and report["compared_on"] == "Gaussian"
  assert report["comparison"]["rms_difference"] < 0.1 * report["comparison"]["rms_logit"]
  assert report["top1"]["count"] == 24 and abs(report["top1"]["network"] - report["top1"]["file"]) <= 2 / 24
  assert report["float_layers"] == {}


@pytest.mark.parametrize("kind", ["stablehlo", "safetensors"])
def test_other_formats(workdir, kind, tmp_path, capsys):
  out = tmp_path / "new" / "net.bin"
  assert main(["--format", kind, "--network", str(workdir / "quantized"), "--out", str(out), "--images", "8"]) == 0
  report = json.loads(capsys.readouterr().out)
  assert out.stat().st_size == report["size"] and len(report["integer_layers"]) == 8
  assert report["comparison"]["max_difference"] < 0.5 * report["comparison"]["rms_logit"]


def test_what_cannot_be_exported_ends_with_status_2(workdir, make, make_quantized, images, tmp_path, capsys):
  network = make(CifarResNet(1)).replace(arch="resnet20", model_options={"blocks_per_stage": 1})
  save_quantized(make_quantized(network, "4w4a", "auto"), tmp_path / "affine")
  save_network(network, tmp_path / "float")
  for arguments, message in (
    (["--format", "onnx", "--network", str(tmp_path / "affine")], "--weight-scheme affine0"),
    (["--format", "safetensors", "--network", str(tmp_path / "float")], "is float"),
    (["--format", "onnx", "--run", str(tmp_path)], "is not the folder of a finished main job"),
    (["--format", "onnx"], "either --run WORKDIR or --network FOLDER"),
    (["--format", "onnx", "--run", str(workdir), "--images", "0"], "--images must be at least 1"),
    (["--format", "onnx", "--run", str(workdir), "--opset", "3"], "opset must be 13 to 23"),
  ):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and error[-1].startswith("error: ") and "Traceback" not in "".join(error)
