"""The benchmarks as commands: what they write, and what they say to a user who cannot run them."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from tests.processes import environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ("--image-size", "16", "--batch", "4", "--seconds", "0.2", "--repeats", "2", "--no-compile")
COMMANDS = ("sample_step", "distill_step", "calibrate")

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="compares with PyTorch")


def run(command: str, *options: str, path: pathlib.Path | None = None) -> subprocess.CompletedProcess[str]:
  # One device, as on a user's machine, whatever the tests run on.
  variables = environment() if path is None else environment(PYTHONPATH=str(path))
  arguments = [sys.executable, "-m", f"benchmarks.{command}", *options]
  return subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=400, check=False)


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_figures_of_both_sides_are_written(command: str, tmp_path: pathlib.Path) -> None:
  file = tmp_path / "figures.json"
  extra = ("--images", "8") if command == "calibrate" else ()
  names = ["resnet32", "resnet20"] if command == "calibrate" else ["resnet20"]
  done = run(command, "--networks", ",".join(names), *TINY, *extra, "--json", str(file))
  assert done.returncode == 0, done.stderr
  assert "resnet20" in done.stdout
  found = json.loads(file.read_text())
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


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_network_is_refused(command: str) -> None:
  done = run(command, "--networks", "resnet21", *TINY)
  assert done.returncode == 2
  assert done.stderr.startswith("error: ")
  assert "resnet21" in done.stderr
  assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_without_pytorch_the_extra_is_named(tmp_path: pathlib.Path) -> None:
  (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
  done = run("sample_step", "--networks", "resnet20", *TINY, path=tmp_path)
  assert done.returncode == 2
  assert "kwjax[bench]" in done.stderr.splitlines()[-1]
  assert "Traceback" not in done.stderr


@needs_torch
@pytest.mark.slow
def test_network_without_a_peer_is_refused() -> None:
  done = run("sample_step", "--networks", "wrn16_1", *TINY)
  assert done.returncode == 2
  assert "there is no PyTorch form of wrn16_1" in done.stderr.splitlines()[-1]
