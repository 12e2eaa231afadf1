"""Seconds until a batch of images is good: the paper's settings, our defaults and variations of them, on trained networks.

    python -m benchmarks.time_to_quality --weights resnet20=resnet20.th resnet44=resnet44.th --plot time_to_quality.png

J_KL in the paper's form, `input` included, has two readings: of the views that a step forwards, and of the clean images.
Compilation and the measuring of the clean images are outside the timed seconds; "with compiling" counts one compilation.
A learning-rate schedule runs over the settings' own number of steps. A run ends when both readings have passed the
threshold, or when its budget is spent.

On a machine that others use as well the clock is no measure: CPU seconds of the process stand beside it, and the ratio
comes from them where the time of a step scatters.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from benchmarks.quality_curves import DEFAULT, PAPER, Point, Run, plot, reached, summary, table
from kwjax.analysis.similarity import measure
from kwjax.errors import KwjaxError
from kwjax.network import Network
from kwjax.runtime.devices.launch import keep_freed_memory
from kwjax.runtime.devices.parallel import device_group
from kwjax.runtime.files import write_json
from kwjax.synthesis import Augmentation, SynthesisConfig
from kwjax.synthesis.pixels import initial_images, initial_state
from kwjax.synthesis.synthesize import compiled_step

THRESHOLDS = {"resnet20": 0.025, "resnet44": 0.015}
_CLEAN_EVERY = 5


def candidates(image_size: int, batch: int) -> dict[str, SynthesisConfig]:
  """The settings that are compared; a variation changes what its name says of the default and nothing else.

  "training" is the augmentation that the networks were trained with; "+clean" leaves one of two copies as it is.

  Args:
    image_size: side of the images in pixels.
    batch: images optimized together, under all settings.
  """
  default = SynthesisConfig.for_network("bns", image_size).replace(batch_size=batch)
  training = Augmentation.training(image_size)
  variations: dict[str, dict[str, Any]] = {
    "2 copies": {"duplicates": 2},
    "4 copies": {"duplicates": 4},
    "from randn": {"init": "randn"},
    "constant rate": {"schedule": "drops"},
    "lr 0.05": {"learning_rate": 0.05},
    "lr 0.2": {"learning_rate": 0.2},
    "lr 0.3": {"learning_rate": 0.3},
    "beta2 0.99": {"betas": (0.9, 0.99)},
    "training": {"augmentation": training},
    "training, 2 copies": {"augmentation": training, "duplicates": 2},
    "training+clean": {"augmentation": dataclasses.replace(training, keep_first=True), "duplicates": 2},
    "paper set": {"augmentation": Augmentation.paper()},
    "crop": {"augmentation": Augmentation(crop_resize=(0.8, 1.0), flip=True)},
    "flip": {"augmentation": Augmentation(flip=True)},
  }
  changed = {name: default.replace(**fields) for name, fields in variations.items()}
  paper = SynthesisConfig.preset("bns", "resnet44_cifar10").replace(batch_size=batch)
  return {PAPER: paper, DEFAULT: default, **{name: config for name, config in changed.items() if config != default}}


def optimize(
  network: Network,
  config: SynthesisConfig,
  *,
  threshold: float,
  budget: float,
  key: jax.Array,
  steps: int | None = None,
) -> Run:
  """Algorithm 1 on one batch, until both readings of J_KL are at most `threshold`.

  Args:
    network: the trained network.
    config: what to run, for at most its number of steps.
    threshold: J_KL, with `input`.
    budget: most wall-clock seconds of optimization.
    key: PRNG key.
    steps: run this many steps whatever the threshold and the budget; None: until the threshold.
  """
  group = device_group(1)
  first, rest = jax.random.split(key)
  state = initial_state(config, initial_images(config, first, config.batch_size, network.image_shape))
  placed, labels = group.place(state), group.place(np.zeros(config.batch_size, np.int32))
  network, rest = group.replicate(network), group.replicate(rest)

  def clean() -> float:
    return float(measure(network, np.clip(np.asarray(placed.images), 0, 1), include_input=True, devices=group).jkl)

  found = Run([], [Point(0, 0.0, 0.0, clean())], 0.0, np.empty(0))
  begin = time.perf_counter()
  step: Any = compiled_step(config, group, config.batch_size)
  step = step.lower(placed, labels, network, rest).compile()
  compile_seconds = time.perf_counter() - begin
  seconds = cpu_seconds = 0.0
  for done in range(1, (config.steps if steps is None else steps) + 1):
    begin, cpu_begin = time.perf_counter(), time.process_time()
    placed, metrics = step(placed, labels, network, rest)
    jax.block_until_ready(placed)
    seconds, cpu_seconds = seconds + time.perf_counter() - begin, cpu_seconds + time.process_time() - cpu_begin
    found.views.append(Point(done, seconds, cpu_seconds, float(metrics["jkl"])))
    if done % _CLEAN_EVERY:
      continue
    found.clean.append(Point(done, seconds, cpu_seconds, clean()))
    both = all(reached(curve, threshold) for curve in (found.views, found.clean))
    if steps is None and (both or seconds >= budget):
      break
  images = np.clip(np.asarray(placed.images), 0, 1)
  return dataclasses.replace(found, compile_seconds=compile_seconds, images=images)


def weight_files(pairs: Sequence[str], networks: Sequence[str]) -> dict[str, str]:
  """`NAME=FILE` pairs as `{name: file}`, one for each of the networks.

  Raises:
    KwjaxError: something is no pair, a network has no weights, or no threshold is known for it.
  """
  for pair in pairs:
    if not all(pair.partition("=")):
      raise KwjaxError(f"--weights takes NAME=FILE, such as resnet20=resnet20.th, found {pair!r}")
  files = dict(pair.split("=", 1) for pair in pairs)
  for name in networks:
    if name not in THRESHOLDS:
      raise KwjaxError(f"no J_KL to reach is known for {name!r}; known: {', '.join(THRESHOLDS)}")
    if name not in files:
      raise KwjaxError(f"{name} needs trained weights: --weights {name}=FILE")
  return files


def main(args: Sequence[str] | None = None) -> int:
  """Command line; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--networks", default=",".join(THRESHOLDS), metavar="A,B", help="default: %(default)s")
  parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=FILE", help="a checkpoint for each network")
  parser.add_argument(
    "--settings", metavar="A,B", help="which to run beside the paper's and the default; all if absent"
  )
  parser.add_argument("--batch", type=int, default=128, metavar="N", help="images (default: %(default)s)")
  parser.add_argument(
    "--budget", type=float, default=300.0, metavar="SECONDS", help="most seconds a run (default: %(default)s)"
  )
  parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the curves there, too")
  parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="PNG of the paper's settings and the default")
  options = parser.parse_args(args)
  try:
    _measure(options)
  except KwjaxError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def _measure(options: argparse.Namespace) -> None:
  from weights_conversion.convert import convert

  names = [name for name in options.networks.split(",") if name]
  files = weight_files(options.weights, names)
  keep_freed_memory()
  rows: list[dict[str, Any]] = []
  for name in names:
    network = convert(name, files[name])
    chosen = candidates(network.image_shape[0], options.batch)
    if options.settings is not None:
      wanted = [PAPER, DEFAULT, *filter(None, options.settings.split(","))]
      unknown = [setting for setting in wanted if setting not in chosen]
      if unknown:
        raise KwjaxError(f"unknown settings {unknown}; known: {', '.join(chosen)}")
      chosen = {setting: chosen[setting] for setting in wanted}
    runs = {}
    for setting, config in chosen.items():
      print(f"{name}: {setting} ...", file=sys.stderr, flush=True)
      key = jax.random.key(options.seed)
      runs[setting] = optimize(network, config, threshold=THRESHOLDS[name], budget=options.budget, key=key)
    rows += summary(name, runs, THRESHOLDS[name])
    print(table(rows[-len(runs) :]), flush=True)
    if options.json:
      write_json(options.json, {"benchmark": "time to quality", "machine": harness.machine(), "results": rows})
  if options.plot:
    plot(rows, options.plot)


if __name__ == "__main__":
  sys.exit(main())
