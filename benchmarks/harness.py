"""Two implementations of one step, timed in turn on the same machine in the same minutes: what a benchmark prints."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kwjax.errors import KwjaxError
from kwjax.runtime.files import write_json

Spec = dict[str, Any]


NETWORKS = ("resnet44", "resnet18", "mobilenet_v2", "densenet121", "efficientnet_lite0")
COMPILE = "compile"
"""Variant: the better layout under torch.compile."""


class Worker:
  """A process that runs one side; always: it has answered every command before the next is sent."""

  def __init__(self, spec: Spec) -> None:
    """Start the process and wait until its first step is done.

    Raises:
      KwjaxError: it cannot run this side; what it printed is on stderr, unless `may_fail` says that it is not missed.
    """
    self.spec = spec
    self._process = subprocess.Popen(
      [sys.executable, "-m", "benchmarks.worker", json.dumps(spec)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL if spec.get("may_fail") else None,
      text=True,
    )
    self.started: dict[str, Any] = self._answer()
    if "error" in self.started:
      self.close()
      raise KwjaxError(self.started["error"])

  def _answer(self) -> Any:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      status = self._process.wait()
      raise KwjaxError(f"{self.spec['framework']} cannot run {self.spec['network']}: its process ended with {status}")
    return json.loads(line)

  def ask(self, command: str | int) -> Any:
    """Send a command and wait for its answer."""
    assert self._process.stdin is not None
    print(command, file=self._process.stdin, flush=True)
    return self._answer()

  def close(self) -> None:
    """End the process."""
    if self._process.poll() is None:
      self._process.kill()
    self._process.wait()


def compare(spec: Spec, variants: Sequence[str], *, seconds: float, repeats: int) -> dict[str, Any]:
  """Median times of kwjax's step and of the best PyTorch variant's, interleaved.

  Args:
    spec: `module`, `network`, `image_size` and whatever that module's `prepare_kwjax` and `prepare_torch` read.
    variants: PyTorch variants to try, layouts before `COMPILE`; one that cannot run is left out.
    seconds: about how long each side is timed in all.
    repeats: rounds, in each of which both sides are timed once.

  Returns:
    JSON-able figures: `ratio` is PyTorch's median over kwjax's.

  Raises:
    KwjaxError: kwjax or every PyTorch variant fails.
  """
  kwjax = Worker({**spec, "framework": "kwjax"})
  torch: Worker | None = None
  trials: dict[str, float | str] = {}
  try:
    peak = kwjax.ask("peak")
    waiting = list(variants)
    while waiting:
      variant = waiting.pop(0)
      if variant == COMPILE:
        # Of the layout that was better without: compiling takes minutes.
        layouts = {name: seconds for name, seconds in trials.items() if isinstance(seconds, float)}
        if not layouts:
          continue
        variant = f"{min(layouts, key=lambda name: layouts[name])}+{COMPILE}"
      try:
        worker = Worker({**spec, "framework": "torch", "variant": variant, "may_fail": True})
      except KwjaxError as error:
        trials[variant] = str(error)
        continue
      # The least of a few: the choice must not fall to a variant that another process's burst has spared.
      trials[variant] = min(worker.ask(3))
      slower: Worker | None = worker
      if torch is None or float(trials[variant]) < float(trials[torch.spec["variant"]]):
        slower, torch = torch, worker
      if slower is not None:
        slower.close()
    if torch is None:
      raise KwjaxError(f"no PyTorch variant can run {spec['network']}: {trials}")
    peak = max(peak, torch.ask("peak"))
    figures = _interleave(kwjax, torch, seconds=seconds, repeats=repeats)
    return {
      "network": spec["network"],
      **figures,
      "torch_variant": torch.spec["variant"],
      "torch_trials_s": trials,
      "kwjax_first_step_s": kwjax.started["first_step_s"],
      "torch_first_step_s": torch.started["first_step_s"],
      "matmul_gflops": peak / 1e9,
    }
  finally:
    kwjax.close()
    if torch is not None:
      torch.close()


def _interleave(kwjax: Worker, torch: Worker, *, seconds: float, repeats: int) -> dict[str, Any]:
  slow = max(min(kwjax.ask(2)), min(torch.ask(2)))
  count = max(1, round(seconds / repeats / slow))
  for worker in (kwjax, torch):
    worker.ask("forget")
  times: dict[str, list[float]] = {"kwjax": [], "torch": []}
  ratios = []
  for _ in range(repeats):
    ours, theirs = kwjax.ask(count), torch.ask(count)
    times["kwjax"] += ours
    times["torch"] += theirs
    ratios.append(statistics.median(theirs) / statistics.median(ours))
  memory = {name: worker.ask("memory") for name, worker in (("kwjax", kwjax), ("torch", torch))}
  ours, theirs = (statistics.median(times[name]) for name in ("kwjax", "torch"))
  return {
    "ratio": theirs / ours,
    "ratio_low": min(ratios),
    "ratio_high": max(ratios),
    "kwjax_ms": ours * 1e3,
    "torch_ms": theirs * 1e3,
    "kwjax_peak_mb": memory["kwjax"] and memory["kwjax"] / 2**20,
    "torch_peak_mb": memory["torch"] and memory["torch"] / 2**20,
    "memory_ratio": memory["kwjax"] / memory["torch"] if memory["kwjax"] and memory["torch"] else None,
    "rounds": repeats,
    "steps_a_round": count,
  }


def sizes(name: str, arguments: argparse.Namespace) -> tuple[int, int]:
  """Side of the images in pixels, and distinct images a step.

  Raises:
    KwjaxError: the network is unknown.
  """
  from kwjax.models import model_info

  size = arguments.image_size or model_info(name).image_shape[0]
  return size, arguments.batch or (128 if size <= 64 else 16)


def forward_operations(name: str, size: int) -> int:
  """Floating-point operations of one image's forward pass, two for a multiply-add."""
  import jax

  from kwjax import intercept
  from kwjax.models import get_model, model_info
  from kwjax.network import Network

  info, module = model_info(name), get_model(name)
  images = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
  variables = jax.eval_shape(module.init, jax.random.key(0), images)
  network = Network(
    module, variables, image_shape=(size, size, 3), input_mean=info.input_mean, input_std=info.input_std, name=name
  )
  return 2 * sum(layer.multiplications for layer in intercept.layers(network))


def machine() -> dict[str, Any]:
  """What the figures were measured on."""
  import jax

  model = platform.processor()
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  if cpuinfo.exists():
    names = [
      line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    model = names[0] if names else model
  versions = {"python": platform.python_version(), "jax": jax.__version__}
  try:
    import torch

    versions["torch"] = torch.__version__
  except ImportError:
    pass
  return {"processor": model, "cores": len(os.sched_getaffinity(0)), "system": platform.system(), **versions}


def parser(description: str | None, *, batch: str = "128 at 32x32, else 16") -> argparse.ArgumentParser:
  """Options that all comparisons share; `batch` says what `build` takes for --batch where it is not given."""
  found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  found.add_argument(
    "--networks", default=",".join(NETWORKS), metavar="A,B", help="networks to time (default: %(default)s)"
  )
  found.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there, too")
  found.add_argument(
    "--seconds", type=float, default=30.0, help="time for each side and network (default: %(default)s)"
  )
  found.add_argument("--repeats", type=int, default=5, help="rounds, each side once in a round (default: %(default)s)")
  found.add_argument("--no-compile", action="store_true", help="do not try torch.compile, which takes minutes to start")
  found.add_argument("--batch", type=int, metavar="N", help=f"distinct images a step (default: {batch})")
  found.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images (default: the network's)")
  return found


def torch_variants(arguments: argparse.Namespace) -> list[str]:
  """Layouts of memory, and the better one under torch.compile."""
  return ["contiguous", "channels_last", *([] if arguments.no_compile else [COMPILE])]


def run(arguments: argparse.Namespace, module: str, build: Callable[[str, argparse.Namespace], Spec], what: str) -> int:
  """Compare every network, print a table and write the JSON file; returns the exit status."""
  names = [name for name in arguments.networks.split(",") if name]
  try:
    specs = [{"module": module, "network": name, **build(name, arguments)} for name in names]
    results = []
    for spec in specs:
      print(f"{what}: {spec['network']} ...", file=sys.stderr, flush=True)
      figures = compare(spec, torch_variants(arguments), seconds=arguments.seconds, repeats=arguments.repeats)
      operations = spec["operations"]
      figures["gflops"] = operations / figures["kwjax_ms"] / 1e6
      figures["torch_gflops"] = operations / figures["torch_ms"] / 1e6
      figures["share_of_peak"] = figures["gflops"] / figures["matmul_gflops"]
      figures.update({key: value for key, value in spec.items() if key not in ("module", "operations")})
      results.append(figures)
      print(_row(figures) if len(results) > 1 else f"{_HEADER}\n{_row(figures)}", flush=True)
      if arguments.json:
        write_json(arguments.json, {"benchmark": what, "machine": machine(), "results": results})
  except KwjaxError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


_HEADER = (
  f"{'network':<20}{'kwjax ms':>10}{'torch ms':>10}{'ratio':>7}{' of rounds':>12}{'GFLOP/s':>9}{'torch':>7}"
  f"{'of peak':>9}{'MB':>7}{'torch':>7}{'ratio':>7}  torch variant"
)


def _row(figures: dict[str, Any]) -> str:
  memory = "".join(f"{figures[key] or 0:>7.0f}" for key in ("kwjax_peak_mb", "torch_peak_mb"))
  return (
    f"{figures['network']:<20}{figures['kwjax_ms']:>10.1f}{figures['torch_ms']:>10.1f}{figures['ratio']:>7.2f}"
    f"{figures['ratio_low']:>7.2f}-{figures['ratio_high']:<4.2f}{figures['gflops']:>9.1f}{figures['torch_gflops']:>7.1f}"
    f"{figures['share_of_peak']:>9.0%}{memory}{figures['memory_ratio'] or 0:>7.2f}  {figures['torch_variant']}"
  )
