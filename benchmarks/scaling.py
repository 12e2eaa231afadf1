"""What several devices cost: time of a synthesis step, and the bytes of its collectives, on 1, 2, 4 and 8 devices.

    python -m benchmarks.scaling --network resnet44 --json scaling.json

The batch is the same for every number of devices, each device forwards its share of it. Without accelerators the devices
are CPU devices that share the same cores: more of them cannot be faster, and what they add is the overhead of splitting.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


class Collectives(NamedTuple):
  """What a compiled step exchanges: number of collectives, and bytes of their results on one device."""

  collectives: int
  bytes: int


def collectives(hlo: str) -> Collectives:
  """Counts the collectives in the text of a compiled module; an asynchronous one is counted at its start.

  Raises:
    KeyError: an element type is not known.
  """
  found = [match[1] for match in _COLLECTIVE.finditer(hlo)]
  sizes = [
    _BYTES[kind] * _product(int(n) for n in dimensions.split(",") if n)
    for shapes in found
    for kind, dimensions in _SHAPE.findall(shapes)
  ]
  return Collectives(len(found), sum(sizes))


def _product(numbers: Any) -> int:
  total = 1
  for number in numbers:
    total *= number
  return total


def prepare(name: str, batch: int, devices: int) -> tuple[Callable[[], None], Collectives]:
  """A function that runs one step of BNS synthesis and waits for it, and what its collectives exchange."""
  import jax
  import numpy as np

  from kwjax.models import get_model, model_info
  from kwjax.network import Network
  from kwjax.runtime.devices.parallel import device_group
  from kwjax.synthesis import SynthesisConfig
  from kwjax.synthesis.pixels import initial_images, initial_state
  from kwjax.synthesis.synthesize import compiled_step

  info, module = model_info(name), get_model(name)
  variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, *info.image_shape), np.float32))
  network = Network(
    module, variables, image_shape=info.image_shape, input_mean=info.input_mean, input_std=info.input_std, name=name
  )
  config = SynthesisConfig.for_network("bns", info.image_shape[0]).replace(batch_size=batch)
  group = device_group(devices)
  state = initial_state(config, initial_images(config, jax.random.key(1), batch, info.image_shape))
  placed = jax.tree.map(lambda leaf: group.shard(leaf) if np.ndim(leaf) else group.replicate(leaf), state)
  labels = group.shard(np.zeros(batch, np.int32))
  rest = (labels, group.replicate(network), group.replicate(jax.random.key(2)))
  step: Any = compiled_step(config, group, batch)
  compiled = step.lower(placed, *rest).compile()

  def run() -> None:
    nonlocal placed
    placed, metrics = compiled(placed, *rest)
    jax.block_until_ready(metrics)

  return run, collectives(compiled.as_text())


def measure(name: str, batch: int, counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
  """One row a number of devices: median milliseconds of a step, collectives and their bytes."""
  rows = []
  for devices in counts:
    step, exchanged = prepare(name, batch, devices)
    step()
    times = []
    for _ in range(repeats):
      start = time.perf_counter()
      step()
      times.append(1e3 * (time.perf_counter() - start))
    row = {"devices": devices, "step_ms": statistics.median(times), **exchanged._asdict()}
    print(
      "{devices:3d} devices  {step_ms:9.1f} ms a step  {collectives:4d} collectives  {bytes:10,d} bytes".format(**row)
    )
    rows.append(row)
  return rows


def main(args: Sequence[str] | None = None) -> int:
  """Command line; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--network", default="resnet44", help="one of kwjax.known_models()")
  parser.add_argument(
    "--batch", type=int, default=32, help="images over all devices, a multiple of each number of devices"
  )
  parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of devices")
  parser.add_argument("--repeats", type=int, default=10, help="steps timed for each number of devices")
  parser.add_argument("--json", help="file for the results")
  options = parser.parse_args(args)
  uneven = [count for count in options.devices if count < 1 or options.batch < 1 or options.batch % count]
  if uneven:
    print(
      f"error: --batch {options.batch} does not divide over {uneven[0]} devices, and equal shares are what is compared",
      file=sys.stderr,
    )
    return 2
  # Read when the backend starts; without effect on accelerators.
  flag = f"--xla_force_host_platform_device_count={max(options.devices)}"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
  import jax

  from kwjax.errors import KwjaxError
  from kwjax.runtime.files import write_json

  device = jax.devices()[0]
  print(f"{options.network}, {options.batch} images, {device.device_kind}, {os.cpu_count()} cores")
  if device.platform == "cpu":
    print("CPU devices share the cores: this shows what splitting costs, not how it scales")
  try:
    rows = measure(options.network, options.batch, options.devices, options.repeats)
    if options.json:
      head = {"network": options.network, "batch": options.batch, "device": device.device_kind, "cores": os.cpu_count()}
      write_json(options.json, {**head, "results": rows})
  except KwjaxError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
