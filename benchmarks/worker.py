"""One side of a comparison in a process of its own, so that its memory is its own: `python -m benchmarks.worker SPEC`.

Reads one command a line from stdin and answers one line of JSON: a number of steps to time, `memory`, or `peak`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments._harness.launch import relaunch_with_huge_pages
from kwjax.errors import KwjaxError


def peak_memory() -> int | None:
  """Largest resident size of this process in bytes since `forget_peak`, or None where the system does not tell."""
  with contextlib.suppress(OSError), open("/proc/self/status") as status:
    for line in status:
      if line.startswith("VmHWM:"):
        return int(line.split()[1]) * 1024
  return None


def forget_peak() -> None:
  """Start a new peak: what compiling took is no cost of a step."""
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL("libc.so.6").malloc_trim(0)
  with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as control:
    control.write("5")


def cores() -> int:
  """Processors this process may use."""
  return len(os.sched_getaffinity(0))


def matmul_peak(framework: str, size: int = 1536, repeats: int = 8) -> float:
  """Floating-point operations a second of a float32 matrix product, the best of a few."""
  if framework == "kwjax":
    from kwjax.runtime.cost import matmul_rate

    return matmul_rate(size, repeats)
  from benchmarks.torch_networks import import_torch

  torch = import_torch()
  x = torch.ones(size, size)
  best = float("inf")
  for _ in range(repeats):
    start = time.perf_counter()
    torch.mm(x, x)
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def prepare(module: Any, spec: dict[str, Any]) -> Callable[[], None]:
  """The function of one side that runs one step and waits for it, on all the machine has."""
  from benchmarks.torch_networks import import_torch, kwjax_network, torch_network

  name, size = spec["network"], spec["image_size"]
  if spec["framework"] == "kwjax":
    from kwjax.cli.command import every_device

    return module.prepare_kwjax(spec, kwjax_network(name, image_size=size), every_device(spec.get("devices")))
  import_torch().set_num_threads(cores())
  return module.prepare_torch(spec, torch_network(name, image_size=size))


def answer(
  command: str, step: Callable[[], None], framework: str, clock: Callable[[], float] = time.perf_counter
) -> Any:
  """What a command is answered with; see the module. Steps are timed by `clock`."""
  if command == "memory":
    return peak_memory()
  if command == "forget":
    return forget_peak()
  if command == "peak":
    return matmul_peak(framework)
  seconds = []
  for _ in range(int(command)):
    start = clock()
    step()
    seconds.append(clock() - start)
  return seconds


def main() -> None:
  """Prepare what the specification says, then serve commands until stdin ends."""
  spec: dict[str, Any] = json.loads(sys.argv[1])
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # what libraries print must not look like an answer
  from kwjax.cli.command import use_compilation_cache, use_every_core
  from kwjax.runtime.devices.launch import keep_freed_memory

  # Both sides run with the same allocator settings.
  keep_freed_memory()
  if spec["framework"] == "kwjax":
    # As the experiments do it.
    use_compilation_cache()
    use_every_core(spec.get("devices"))
  module = importlib.import_module(spec["module"])
  start = time.perf_counter()
  try:
    step = prepare(module, spec)
    first = time.perf_counter()
    step()
  except KwjaxError as error:
    print(json.dumps({"error": str(error)}), file=answers)
    return
  print(json.dumps({"prepare_s": first - start, "first_step_s": time.perf_counter() - first}), file=answers)
  clock = time.process_time if spec.get("clock") == "cpu" else time.perf_counter
  for line in sys.stdin:
    print(json.dumps(answer(line.strip(), step, spec["framework"], clock)), file=answers)


if __name__ == "__main__":
  relaunch_with_huge_pages()
  main()
