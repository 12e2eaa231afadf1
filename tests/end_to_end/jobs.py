"""A main job small enough to be run dozens of times, as a process that can be watched, killed and compared."""

from __future__ import annotations

import json
import pathlib
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from experiments import cifar_bns
from kwjax import kernels
from kwjax.models import get_model
from kwjax.network import Network, save_network
from tests.forked import Forked
from tests.networks import random_network
from tests.processes import environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 300.0
"""No wait in these tests is that long; beyond it a job hangs."""

# What the job says when a stage begins. The start lasts from the birth of the process to the first of these lines.
MARKERS = {
  "synthesis": "everything goes to",
  "calibration": "measuring the float network",
  "distillation": "fine-tuning ",
  "report": "writing the report",
  "end": "done: ",
}
STAGES = ("start", *list(MARKERS)[:-1])

_MODEL = {"num_classes": 10, "blocks_per_stage": 0}
SIZES = {
  "images": 12,
  "held-out": 4,
  "batch-size": 8,
  "reconstruct-iterations": 0,
  "steps": 150,
  "distill-steps": 100,
  "checkpoint-seconds": 0.2,
  "checkpoint-steps": 20,
}


def tiny_network() -> Network:
  """A convolution, BatchNorm and a classifier on 8x8 images, under a name that `load_network` knows."""
  network = random_network(get_model("resnet20", **_MODEL), image_shape=(8, 8, 3))
  return network.replace(arch="resnet20", model_options=_MODEL)


def save_inputs(folder: pathlib.Path) -> None:
  """The network and 12 images with its own labels."""
  network = tiny_network()
  save_network(network, folder / "network")
  images = np.asarray(jax.random.uniform(jax.random.key(0), (12, 8, 8, 3)))
  np.savez(
    folder / "data.npz",
    images=(images * 255).astype(np.uint8),
    labels=np.asarray(jnp.argmax(network.apply(images), -1)),
  )


def arguments(inputs: pathlib.Path, workdir: pathlib.Path, **sizes: float) -> list[str]:
  """Command line of the job in `workdir`; `sizes` replace some of `SIZES`."""
  numbers = {**SIZES, **{name.replace("_", "-"): value for name, value in sizes.items()}}
  options = {"network": inputs / "network", "eval-data": inputs / "data.npz", "workdir": workdir, "preset": "smoke"}
  given = [text for name, value in {**options, **numbers}.items() for text in (f"--{name}", str(value))]
  return [*given, "--bits", "4w4a", "--first-last", "none"]


class Process:
  """`python -m experiments.cifar_bns` under way; what it says goes to a file."""

  def __init__(self, inputs: pathlib.Path, workdir: pathlib.Path, log: pathlib.Path, **sizes: float) -> None:
    self.log = log
    # Programs of their own: a job that is killed may leave half of one. They compile in less time than those that are kept by
    # default.
    # And the same kernels in all workers, whatever ran before in one of them: other kernels give other bits.
    variables = {"XLA_FLAGS": environment()["XLA_FLAGS"], "JAX_COMPILATION_CACHE_DIR": str(inputs / "xla")}
    variables[kernels.VARIABLE] = "off"
    self._process = Forked(cifar_bns.main, (arguments(inputs, workdir, **sizes),), log, variables)
    self.pid = self._process.pid

  def runs(self) -> bool:
    """Whether it has not ended."""
    return self._process.poll() is None

  def said(self) -> str:
    """Everything up to now."""
    return self.log.read_text(errors="replace")

  def stage(self) -> str:
    """The stage that the job has said it is in; `end` after the last."""
    text = self.said()
    reached = [stage for stage, marker in MARKERS.items() if marker in text]
    return reached[-1] if reached else "start"

  def wait_for(self, stage: str) -> None:
    """Returns when the job has reached a stage or has ended."""
    order, deadline = (*STAGES, "end"), time.monotonic() + LIMIT_SECONDS
    while self.runs() and order.index(self.stage()) < order.index(stage):
      assert time.monotonic() < deadline, f"no {stage} in time: {self.said()[-2000:]}"
      time.sleep(0.005)

  def send(self, number: signal.Signals) -> None:
    """Sends a signal, if the job still runs."""
    self._process.send_signal(number)

  def signal(self, number: signal.Signals) -> int:
    """Sends a signal, if the job still runs; returns the exit status."""
    self.send(number)
    return self.wait()

  def wait(self) -> int:
    """Exit status; a job that hangs is killed and fails the test."""
    try:
      return self._process.wait(LIMIT_SECONDS)
    except TimeoutError as error:
      self._process.kill()
      raise TimeoutError(f"the job hangs: {self.said()[-2000:]}") from error


def result(workdir: pathlib.Path) -> dict[str, Any]:
  """Everything a run has made, bit by bit, except the seconds it took: images, curves, ranges, scores, the network."""
  found: dict[str, Any] = {}
  for path in sorted(workdir.glob("*/images/*.safetensors")):
    for name, array in safetensors.numpy.load_file(path).items():
      if name != "history.seconds":
        found[f"{path.relative_to(workdir)} {name}"] = (array.dtype.name, array.shape, array.tobytes())
  for path in sorted(workdir.glob("stages/*.json")):
    found[str(path.relative_to(workdir))] = json.loads(path.read_text())
  for path in sorted(workdir.glob("quantized/*")):
    found[str(path.relative_to(workdir))] = path.read_bytes()
  return found


def assert_same_result(workdir: pathlib.Path, expected: dict[str, Any]) -> None:
  """Compares with what `result` gave for an undisturbed run."""
  found = result(workdir)
  assert found.keys() == expected.keys()
  different = [name for name in expected if found[name] != expected[name]]
  assert not different, f"{workdir} differs from the undisturbed run in {different}"
