"""The benchmarks as commands: what they write, and what they say to a user who cannot run them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import harness, sample_step, torch_networks, worker
from benchmarks.torch_networks import kwjax_network
from kwjax.network import Network
from tests.processes import environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ("--image-size", "16", "--batch", "4", "--seconds", "0.2", "--repeats", "2", "--no-compile")
COMMANDS = ("sample_step", "distill_step", "calibrate")

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="compares with PyTorch")


@functools.cache
def converted(name: str, image_size: int) -> Network:
  return kwjax_network(name, image_size=image_size)


class Local:
  """`harness.Worker` without a process of its own, on one device."""

  def __init__(self, spec: harness.Spec) -> None:
    self.spec = spec
    self._step = worker.prepare(importlib.import_module(spec["module"]), {**spec, "devices": 1})
    self._step()
    self.started = {"first_step_s": 1.0}

  def ask(self, command: str | int) -> Any:
    return worker.answer(str(command), self._step, self.spec["framework"])

  def close(self) -> None:
    pass


@pytest.fixture
def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(harness, "Worker", Local)
  monkeypatch.setattr(torch_networks, "kwjax_network", converted)


def check(found: dict[str, Any], names: list[str]) -> None:
  """The file of a run with `TINY`."""
  assert {"processor", "cores", "jax", "torch"} <= set(found["machine"])
  assert [figures["network"] for figures in found["results"]] == names
  figures = found["results"][-1]
  assert (figures["image_size"], figures["batch"], figures["rounds"]) == (16, 4, 2)
  assert figures["ratio"] == pytest.approx(figures["torch_ms"] / figures["kwjax_ms"])
  assert figures["torch_variant"] in ("contiguous", "channels_last")
  assert set(figures["torch_trials_s"]) == {"contiguous", "channels_last"}
  for side in ("kwjax", "torch"):
    assert figures[f"{side}_ms"] > 0
    assert figures[f"{side}_peak_mb"] is None or figures[f"{side}_peak_mb"] > 10
  assert figures["gflops"] * figures["kwjax_ms"] == pytest.approx(figures["torch_gflops"] * figures["torch_ms"])
  assert figures["share_of_peak"] == pytest.approx(figures["gflops"] / figures["matmul_gflops"])


@needs_torch
@pytest.mark.usefixtures("without_processes")
@pytest.mark.parametrize("command", COMMANDS)
def test_figures_of_both_sides_are_written(
  command: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  file = tmp_path / "figures.json"
  names = ["resnet20"] * (2 if command == "calibrate" else 1)
  extra = ("--images", "8") if command == "calibrate" else ()
  main = importlib.import_module(f"benchmarks.{command}").main
  assert main(["--networks", ",".join(names), *TINY, *extra, "--json", str(file)]) == 0
  assert capsys.readouterr().out.count("resnet20") == len(names)
  check(json.loads(file.read_text()), names)


@needs_torch
@pytest.mark.slow
def test_figures_come_from_processes(tmp_path: pathlib.Path) -> None:
  file = tmp_path / "figures.json"
  options = ["--networks", "resnet20", *TINY, "--images", "8", "--json", str(file)]
  command = [sys.executable, "-m", "benchmarks.calibrate", *options]
  # One device, as on a user's machine, whatever the tests run on.
  done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, check=False)
  assert done.returncode == 0, done.stderr
  assert "resnet20" in done.stdout
  check(json.loads(file.read_text()), ["resnet20"])


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_network_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
  assert importlib.import_module(f"benchmarks.{command}").main(["--networks", "resnet21", *TINY]) == 2
  said = capsys.readouterr().err
  assert said.startswith("error: ")
  assert "resnet21" in said
  assert said.count("\n") == 1


@pytest.mark.usefixtures("without_processes")
def test_without_pytorch_the_extra_is_named(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
  assert sample_step.main(["--networks", "resnet20", *TINY]) == 2
  assert "kwjax[bench]" in capsys.readouterr().err.splitlines()[-1]


@needs_torch
@pytest.mark.usefixtures("without_processes")
def test_network_without_a_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
  assert sample_step.main(["--networks", "wrn16_1", *TINY]) == 2
  assert "there is no PyTorch form of wrn16_1" in capsys.readouterr().err.splitlines()[-1]
