"""How long `import kwjax` takes beside `import flax`, which it cannot do without: fresh processes in turn, medians.

    python -m benchmarks.import_time --repeats 15

prints both times, their ratio, and the slowest imports that kwjax adds.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.harness import machine

# CPU time as well as the clock's: on a busy machine it is the one that stays the same.
_PROGRAM = """
import time
wall, cpu = time.perf_counter(), time.process_time()
import {module}
print(time.perf_counter() - wall, time.process_time() - cpu)
"""
MODULES = ("flax", "kwjax")


def measure(module: str, folder: str) -> tuple[float, float]:
  """Seconds of one import in a new process, by the clock and of CPU time.

  Args:
    module: what is imported.
    folder: where the process runs, so that what is imported is what is installed there.
  """
  program = _PROGRAM.format(module=module)
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=folder)
  wall, cpu = map(float, done.stdout.split())
  return wall, cpu


def slowest(module: str, folder: str, count: int = 8) -> list[tuple[float, str]]:
  """What takes longest in the import of a module that itself imports nothing slow: (own milliseconds, package), summed."""
  command = [sys.executable, "-X", "importtime", "-c", f"import flax; import {module}"]
  text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stderr
  own: dict[str, float] = {}
  after_flax = False
  for line in text.splitlines():
    match = re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", line)
    if match and after_flax:
      package = ".".join(match[2].split(".")[:1])
      own[package] = own.get(package, 0.0) + int(match[1]) / 1000
    after_flax = after_flax or bool(match and match[2] == "flax")
  return sorted(((seconds, package) for package, seconds in own.items()), reverse=True)[:count]


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the benchmark; returns the exit status."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.import_time", description=__doc__)
  parser.add_argument("--repeats", type=int, default=11, help="imports of each module (default: 11)")
  parser.add_argument("--out", type=pathlib.Path, default=None, help="JSON file to write")
  arguments = parser.parse_args(args)
  if arguments.repeats < 1:
    parser.error(f"--repeats must be at least 1, found {arguments.repeats}")
  times: dict[str, list[tuple[float, float]]] = {module: [] for module in MODULES}
  with tempfile.TemporaryDirectory() as folder:
    for module in MODULES:
      measure(module, folder)  # compiles what is not compiled yet, and fills the system's cache of files
    for _ in range(arguments.repeats):
      for module in MODULES:
        times[module].append(measure(module, folder))
    parts = slowest("kwjax", folder)
  medians = {module: [statistics.median(found) for found in zip(*times[module])] for module in MODULES}
  ratio, cpu_ratio = (kwjax / flax for flax, kwjax in zip(medians["flax"], medians["kwjax"]))
  for module, (wall, cpu) in medians.items():
    print(f"import {module:6} {wall:.3f} s, {cpu:.3f} s of CPU time (median of {arguments.repeats})")
  print(f"ratio {ratio:.2f} by the clock, {cpu_ratio:.2f} by CPU time")
  print("beyond flax, ms by package: " + ", ".join(f"{package} {own:.0f}" for own, package in parts))
  if arguments.out is not None:
    figures = {"medians": medians, "ratio": ratio, "cpu_ratio": cpu_ratio, "machine": machine()}
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
