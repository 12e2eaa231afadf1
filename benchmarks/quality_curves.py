"""Curves of J_KL over time: when each reached a threshold, how that compares with the paper's settings, table and plot."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kwjax.errors import KwjaxError

PAPER, DEFAULT = "paper", "default"
READINGS = ("views", "clean")
_NOISY = 0.2


class Point(NamedTuple):
  """One J_KL.

  Attributes:
    step: steps done.
    seconds: wall-clock seconds of optimization until then.
    cpu_seconds: CPU seconds of the process until then, of all its threads.
    jkl: J_KL, with `input`.
  """

  step: int
  seconds: float
  cpu_seconds: float
  jkl: float


@dataclasses.dataclass(frozen=True)
class Run:
  """How J_KL fell under one setting.

  Attributes:
    views: J_KL of the views of each step, known when the step is done.
    clean: J_KL of the images themselves, every few steps, the starting point included.
    compile_seconds: wall-clock seconds of one compilation.
    images: f32[n,h,w,c] in [0,1], as the run ended.
  """

  views: list[Point]
  clean: list[Point]
  compile_seconds: float
  images: np.ndarray


def reached(curve: Sequence[Point], threshold: float) -> Point | None:
  """The first point at which J_KL is at most the threshold; None where it never is."""
  return next((point for point in curve if point.jkl <= threshold), None)


def scatter(curve: Sequence[Point]) -> float:
  """Spread of the wall-clock time of a step: interquartile range over median; 0 for fewer than four steps."""
  times = [b.seconds - a.seconds for a, b in itertools.pairwise(curve)]
  if len(times) < 4:
    return 0.0
  low, middle, high = statistics.quantiles(times, n=4)
  return (high - low) / middle


class Ratio(NamedTuple):
  """How many times sooner than with the paper's settings; a lower bound where those never reached the threshold."""

  value: float
  is_bound: bool


def ratio(paper: Sequence[Point], curve: Sequence[Point], threshold: float, clock: str) -> Ratio | None:
  """Time of the paper's settings to the threshold over that of a curve; None where the curve does not reach it.

  Args:
    paper: the paper's curve, not empty.
    curve: another's.
    threshold: J_KL.
    clock: field of Point: "seconds", "cpu_seconds" or "step".
  """
  theirs, ours = reached(paper, threshold), reached(curve, threshold)
  if ours is None:
    return None
  end = paper[-1] if theirs is None else theirs
  # The starting point itself may be good enough, after no time at all.
  spent = getattr(ours, clock)
  return Ratio(getattr(end, clock) / spent if spent else math.inf, theirs is None)


def summary(network: str, runs: Mapping[str, Run], threshold: float) -> list[dict[str, Any]]:
  """A JSON-able row for each settings: what each reading took to the threshold, and its ratio to the paper's.

  Args:
    network: its name.
    runs: `{name: Run}`, that of the paper's settings included.
    threshold: J_KL.
  """
  noisy = max(scatter(run.views) for run in runs.values()) > _NOISY
  rows = []
  for name, run in runs.items():
    row: dict[str, Any] = {"network": network, "settings": name, "threshold": threshold, "noisy": noisy}
    for reading in READINGS:
      curve = getattr(run, reading)
      point = reached(curve, threshold)
      wall, cpu = (
        ratio(getattr(runs[PAPER], reading), curve, threshold, clock) for clock in ("seconds", "cpu_seconds")
      )
      best = cpu if noisy else wall
      row[reading] = {
        "reached": None if point is None else point._asdict(),
        "seconds_with_compiling": None if point is None else point.seconds + run.compile_seconds,
        "ratio": None if best is None else best.value,
        "ratio_is_bound": best is not None and best.is_bound,
        "ratio_seconds": None if wall is None else wall.value,
        "ratio_cpu_seconds": None if cpu is None else cpu.value,
        "curve": [point._asdict() for point in curve],
      }
    row |= {"compile_seconds": run.compile_seconds, "step_scatter": scatter(run.views)}
    rows.append(row)
  return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The rows of one network as text."""
  head = rows[0]
  clock = "CPU seconds, because the time of a step scatters" if head["noisy"] else "wall-clock seconds"
  group = f"{'step':>6}{'s':>8}{'CPU s':>8}{'with compiling':>16}{'ratio':>8}"
  lines = [
    f"{head['network']}: to J_KL <= {head['threshold']}; ratio to the paper's settings from {clock}",
    f"{'':<20}{'views':>{len(group)}}{'clean images':>{len(group)}}",
    f"{'settings':<20}{group}{group}",
  ]
  for row in rows:
    cells = f"{row['settings']:<20}"
    for reading in READINGS:
      found = row[reading]
      point = found["reached"]
      if point is None:
        missed = f"not by step {found['curve'][-1]['step']}"
        cells += f"{missed:>{len(group)}}"
        continue
      times = f"{'>' if found['ratio_is_bound'] else ''}{found['ratio']:.2f}"
      cells += f"{point['step']:>6}{point['seconds']:>8.1f}{point['cpu_seconds']:>8.1f}"
      cells += f"{found['seconds_with_compiling']:>16.1f}{times:>8}"
    lines.append(cells)
  return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Both readings over time, a row of axes a network, for the paper's settings and the default; logarithmic axes.

  Args:
    rows: of `summary`, for one or more networks.
    path: the PNG to write.

  Raises:
    KwjaxError: it cannot be written.
  """
  networks = list(dict.fromkeys(row["network"] for row in rows))
  figure = Figure(figsize=(9, 3.4 * len(networks)), dpi=144, layout="constrained")
  grid = figure.subplots(len(networks), 2, squeeze=False)
  for line, name in zip(grid, networks, strict=True):
    own = [row for row in rows if row["network"] == name and row["settings"] in (PAPER, DEFAULT)]
    clock, unit = ("cpu_seconds", "CPU seconds") if own[0]["noisy"] else ("seconds", "seconds")
    for axes, reading in zip(line, READINGS, strict=True):
      for row, colour in zip(own, ("#D55E00", "#0072B2"), strict=False):
        points = [point for point in row[reading]["curve"] if point["step"]]
        label = "paper's settings" if row["settings"] == PAPER else "kwjax's default"
        axes.loglog([p[clock] for p in points], [p["jkl"] for p in points], color=colour, label=label)
      threshold = own[0]["threshold"]
      axes.axhline(threshold, color="#666666", linestyle="--", linewidth=1, label=f"threshold {threshold}")
      axes.set_title(f"{name}: {'views' if reading == 'views' else 'clean images'}")
      axes.set_xlabel(f"{unit} of optimization")
      axes.set_ylabel("$J_{KL}$ (nats)")
      axes.grid(which="both", color="#dddddd", linewidth=0.5)
      axes.legend(frameon=False, fontsize=9, loc="upper right")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
  except OSError as error:
    raise KwjaxError(f"cannot write the figure {path}: {error.strerror or error}") from error
