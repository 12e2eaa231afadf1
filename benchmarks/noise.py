"""How many noise images a second kwjax makes: dead leaves of all shapes, and Gaussian pixels; after warm-up, medians.

    python -m benchmarks.noise --image-size 32 --count 2048

on one device and on one a core, as the experiments do it. No peer: the published generator draws leaf by leaf in Python.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

import jax

from benchmarks.harness import machine
from kwjax.synthesis import dead_leaves, gaussian_images


def rate(make: Callable[[], jax.Array], *, count: int, repeats: int) -> float:
  """Images a second, the median of some calls after one that compiles.

  Args:
    make: makes `count` images.
    count: of them.
    repeats: calls that are timed.
  """
  make().block_until_ready()
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    make().block_until_ready()
    seconds.append(time.perf_counter() - begin)
  return count / statistics.median(seconds)


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the benchmark; returns the exit status."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description=__doc__)
  parser.add_argument("--image-size", type=int, default=32, help="pixels of a side (default: 32)")
  parser.add_argument("--count", type=int, default=2048, help="images a call (default: 2048)")
  parser.add_argument("--repeats", type=int, default=5, help="calls that are timed (default: 5)")
  parser.add_argument("--json", type=pathlib.Path, default=None, help="JSON file to write")
  arguments = parser.parse_args(args)
  for name in ("image_size", "count", "repeats"):
    if getattr(arguments, name) < 1:
      parser.error(f"--{name.replace('_', '-')} must be at least 1, found {getattr(arguments, name)}")
  # Where JAX runs already it keeps the devices it has.
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
  key, count, shape = jax.random.key(0), arguments.count, (arguments.image_size, arguments.image_size, 3)
  devices = jax.local_devices()
  makers: dict[str, Callable[[], jax.Array]] = {
    "dead leaves, one device": lambda: dead_leaves(key, count, shape),
    f"dead leaves, {len(devices)} devices": lambda: dead_leaves(key, count, shape, devices=devices),
    "Gaussian, one device": lambda: gaussian_images(key, count, shape, (0.5,) * 3, (0.25,) * 3),
  }
  found = {name: rate(make, count=count, repeats=arguments.repeats) for name, make in makers.items()}
  for name, images in found.items():
    print(f"{name:24} {images:10.0f} images a second at {arguments.image_size}x{arguments.image_size}")
  if arguments.json is not None:
    arguments.json.write_text(json.dumps({"machine": machine(), "images_per_second": found}, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
