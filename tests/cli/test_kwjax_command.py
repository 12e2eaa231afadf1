"""The command `kwjax`: each subcommand on a tiny network, help that teaches, one sentence and status 2 for mistakes."""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

import kwjax
from kwjax.__main__ import main
from tests.end_to_end import jobs
from tests.end_to_end.bad_inputs import ARCH, state_dict
from tests.weights_conversion.checkpoint_files import save_state_dict

COMMANDS = {
  "convert": ("--arch", "--source", "--out", "--overwrite"),
  "compress": ("--network", "--bits", "--scheme", "--calibration", "--weight-scheme", "--eval-data", "--workdir"),
  "measure": ("--network", "--data", "--limit"),
  "export": ("--run", "--network", "--format", "--opset", "--platforms"),
  "info": ("--network",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """`network/` and `data.npz`, 12 images with the network's own answers; `run/` of a main job."""
  folder = tmp_path_factory.mktemp("command")
  jobs.save_inputs(folder)
  options = {"--network": folder / "network", "--workdir": folder / "run", "--preset": "smoke", "--devices": 1}
  given = [str(part) for pair in options.items() for part in pair]
  assert main(["compress", *given, "--bits", "8w8a", "--distill-steps", "0"]) == 0
  return folder


def test_compress_saves_what_its_report_describes(folder: pathlib.Path) -> None:
  report = json.loads((folder / "run" / "report.json").read_text())
  student = kwjax.load_quantized(folder / "run" / "quantized")
  assert report["protocol"]["saved network"].startswith(f"{student.name}, calibrated")
  assert set(report["agreement"]) == {"8w8a"}
  assert (folder / "run" / "report.html").exists()


def test_measure_prints_what_the_library_measures(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  network, data = kwjax.load_network(folder / "network"), kwjax.load_data(f"{folder / 'data.npz'}")
  given = ["--data", str(folder / "data.npz"), "--devices", "1", "--batch-size", "5"]
  assert main(["measure", "--network", str(folder / "network"), *given]) == 0
  captured = capsys.readouterr()
  found = json.loads(captured.out)
  expected = kwjax.measure(network, data.all()[0], include_input=True)
  assert found["jkl"] == pytest.approx(float(expected.jkl), rel=1e-4)
  assert list(found["per_layer"]) == list(expected.per_layer)
  assert found["top1"] == kwjax.evaluate(network, data).top1
  assert found["top1_interval"][0] < found["top1"] <= found["top1_interval"][1] <= 1
  assert f"top-1 {found['top1']:.2%} of 12 images" in captured.err

  np.savez(folder / "unlabelled.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
  given = ["--data", str(folder / "unlabelled.npz"), "--devices", "1", "--limit", "2"]
  assert main(["measure", "--network", str(folder / "run" / "quantized"), *given]) == 0
  captured = capsys.readouterr()
  assert json.loads(captured.out)["images"] == 2
  assert set(json.loads(captured.out)) == {"network", "data", "images"}
  assert "J_KL is left out" in captured.err
  assert "the images have no labels" in captured.err


def test_export_writes_a_file_of_a_run(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  out = folder / "net.safetensors"
  given = ["--run", str(folder / "run"), "--format", "safetensors", "--out", str(out), "--images", "4"]
  assert main(["export", *given]) == 0
  assert json.loads(capsys.readouterr().out)["size"] == out.stat().st_size


def test_info_describes_the_installation_or_a_network(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  assert main(["info"]) == 0
  text = capsys.readouterr().out
  assert f"kwjax {kwjax.__version__}" in text
  assert all(name in text for name in kwjax.known_models())
  assert main(["info", "--network", str(folder / "network")]) == 0
  lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
  network = kwjax.load_network(folder / "network")
  weights = sum(leaf.size for leaf in jax.tree.leaves(network.variables["params"]))
  assert lines["parameters"] == f"{weights:,}"
  assert lines["input"].startswith("8x8x3")
  assert lines["classes"] == "10"
  # A 3x3 convolution of 3 to 16 channels on 8x8 pixels, and a classifier of 16 to 10.
  assert lines["multiply-adds"] == f"{8 * 8 * 9 * 3 * 16 + 16 * 10:,} an image"
  assert lines["layers"] == "2 convolutions and dense layers, 1 BatchNorm layers"
  assert main(["info", "--network", str(folder / "run" / "quantized")]) == 0
  assert "quantization    8w8a" in capsys.readouterr().out


def test_convert_writes_a_network(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  path = save_state_dict(tmp_path / "weights.pth", state_dict())
  given = ["convert", "--arch", ARCH, "--source", str(path), "--out", str(tmp_path / "network")]
  assert main([*given, "--input-mean", "0.1", "0.2", "0.3"]) == 0
  assert "resnet20, 10 classes" in capsys.readouterr().out
  assert kwjax.load_network(tmp_path / "network").input_mean == (0.1, 0.2, 0.3)
  assert main(given) == 2
  assert "already holds a network" in capsys.readouterr().err
  assert main([*given, "--overwrite", "--quiet"]) == 0
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("COLUMNS", "200")
  with pytest.raises(SystemExit) as stop:
    main([command, "--help"])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  assert f"usage: kwjax {command}" in text
  assert f"  kwjax {command} " in text.partition("options")[0], "an example"
  for option in COMMANDS[command]:
    assert option in text


def test_without_arguments_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit) as stop:
    main([])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  assert all(f"• {command}" in text for command in COMMANDS)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (["info", "--network", "nowhere"], "nowhere is not a kwjax network"),
    (["compress", "--arch", "resnet20"], "--arch and --weights belong together"),
    (["compress", "--network", "nowhere"], "nowhere is not a kwjax network"),
    (["measure", "--network", "nowhere", "--data", "x.npz"], "nowhere is not a kwjax network"),
    (["export", "--format", "onnx"], "either --run WORKDIR or --network FOLDER"),
    (["convert", "--arch", "resnet21", "--source", "x.pth", "--out", "out"], "resnet21"),
  ],
)
def test_mistakes_are_one_sentence_and_status_2(
  given: list[str],
  message: str,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.chdir(tmp_path)
  assert main(given) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  assert message in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [["squeeze"], ["compress", "--no-such"], ["measure"], ["--no-such"]])
def test_a_command_line_that_cannot_be_read_ends_with_status_2(
  given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
  with pytest.raises(SystemExit) as stop:
    main(given)
  assert stop.value.code == 2
  assert "Traceback" not in capsys.readouterr().err


def test_without_tyro_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
  monkeypatch.setitem(sys.modules, "tyro", None)  # what Python does with a module that may not be imported
  assert main(["info"]) == 2
  assert 'error: the kwjax command needs the package tyro: pip install "kwjax[cli]"' in capsys.readouterr().err
  assert main(["--version"]) == 0
