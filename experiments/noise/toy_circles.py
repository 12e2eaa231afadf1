"""The toy problem of noise-engineered distillation (Raikwar & Mishra, 2022): circles in the plane, students that only saw noise.

    python -m experiments.noise.toy_circles --seeds 0 1 2

A perceptron with two BatchNorm layers learns to tell two concentric circles apart; students with the same layers and random
weights learn its answers on Gaussian noise in the plane, with the teacher's BatchNorm layers on their running statistics or on
those of the batch. Points are images of 1x1 pixels with two channels, as the rest of the library takes images. Everything is made
here: there is no network and no data to give.

Rows: where the noise lies, in the circles' standard deviations: `matched`, N(0, 1), over them; `narrow`, a tenth as wide; `wide`,
five times as wide; `shifted`, three to the right; and `data`, the circles themselves. Columns: the teacher's statistics, and the
statistics that the student is used with: `own`, those that it learned from the noise, or `readjusted`, made anew from the circles
without their labels. The tables: accuracy on new points of the circles, and agreement with the teacher over the square that the
figure shows.

What it shows: to a teacher on running statistics all narrow noise is one class, and most of the shifted noise, so there is
little to learn. The statistics of the batch undo any shift and scale of the input, but for BatchNorm's epsilon, since a dense
layer passes them on to every channel of the BatchNorm behind it: its student learns the circles in normalized coordinates, and
they come to lie at the right place when its statistics are readjusted. A student of running statistics must not be readjusted:
what it knows, it knows in the coordinates of its noise. Where noise covers the circles, all do well.

Ours, --preset cpu, three seeds, half a minute on one core: students of current statistics, readjusted, are right on 99.99 (.01)
per cent of new points whatever the noise; those of running ones, with their own statistics, on 99.99 matched, 50.0 narrow, 99.0
(1.1) wide, 79.3 (2.8) shifted. Published are figures of such regions, no numbers known to us.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import tyro

from experiments._harness.study import CellPlan, Setup, Study, StudyOptions, run
from experiments._harness.study_options import Names
from experiments._harness.tables import PERCENT, Results, Table
from experiments.noise.toy_plane import (
  DATA,
  GRID,
  NOISES,
  SHOWN,
  Sizes,
  as_images,
  as_points,
  circles,
  classes_of,
  grid_points,
  inputs,
  teacher,
  untrained,
)
from kwjax.analysis.region_figures import RegionPanel, region_panels
from kwjax.batchnorm import adjust_statistics
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.cli.options import Preset
from kwjax.compression.workspace import DISTILL_KEY, Workspace, stream_key
from kwjax.distillation import DistillConfig, distill
from kwjax.network import Network
from kwjax.runtime.reporting.report import Picture

RUNNING, CURRENT = "running", "current"
OWN, READJUSTED = "own", "readjusted"
COLUMNS = {
  f"{teacher}-{student}": (teacher, student) for teacher in (RUNNING, CURRENT) for student in (OWN, READJUSTED)
}
ACCURACY, AGREEMENT = "accuracy", "agreement"

_SIZES = {"cpu": Sizes(4096, 400, 600, 128), "paper": Sizes(50_000, 4000, 8000, 256), "smoke": Sizes(64, 4, 4, 16)}


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the toy problem."""

  preset: Preset = "cpu"
  """cpu: seconds. paper: ten times the steps. smoke: the shortest complete run."""
  seeds: tuple[int, ...] = (0,)
  """Seeds to measure now: of the circles, the teacher, the noise and the student."""
  rows: Names = ()
  """Rows to measure now; the others keep what was measured before."""
  columns: Names = ()
  """Columns to measure now."""
  workdir: pathlib.Path | None = None
  """Where everything goes, over several runs. Default: runs/toy_circles-circles."""
  resume: bool = True
  """Keep the cells of earlier runs; --no-resume starts over."""
  devices: Annotated[int, tyro.conf.arg(metavar="N")] = 1
  """Devices that the work is spread over; for networks this small more are slower."""
  dry_run: bool = False
  """Say how many cells would be measured, and do nothing."""

  def of_study(self) -> StudyOptions:
    """The same choices for the frame."""
    return StudyOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with."""

  sizes: Sizes
  measures: Mapping[str, str]  # title of a table: measure

  @property
  def config(self) -> DistillConfig:
    """Of the students, before the teacher's statistics are chosen."""
    steps, batch_size = self.sizes.distillation_steps, self.sizes.batch_size
    return DistillConfig.preset("noise", steps=steps, batch_size=batch_size, learning_rate=1e-2)

  def taught(self, workspace: Workspace, seed: int) -> Mapping[str, Any]:
    """The teacher's classes over the square, and its accuracy."""

    def compute() -> dict[str, Any]:
      return self.judged(teacher(seed, self.sizes), seed)

    return workspace.results.once(f"teachers/{self.sizes.training_steps}-{self.sizes.points}-seed{seed}", compute)

  def judged(self, network: Network, seed: int) -> dict[str, Any]:
    """Accuracy on new points, and the classes over the square as digits."""
    points, labels = circles(seed, self.sizes.points, held_out=True)
    regions = "".join(map(str, classes_of(network, grid_points())))
    return {ACCURACY: float(np.mean(classes_of(network, points) == labels)), "regions": regions}

  def distilled(self, workspace: Workspace, row: str, statistics: str, seed: int) -> Mapping[str, Any]:
    """A student judged with either of its statistics, `{own, readjusted: ...}`; made once."""

    def compute() -> dict[str, Any]:
      workspace.stop_if_asked()
      of = teacher(seed, self.sizes)
      images = inputs(row, of, seed, self.sizes.points)
      config = self.config.replace(current=(".*",) if statistics == CURRENT else ())
      key = stream_key(seed, DISTILL_KEY)
      student = distill(untrained(seed, 1), of, images, config, key=key, devices=workspace.group)
      seen = as_images(circles(seed, self.sizes.points)[0])
      # One batch: the statistics are those of all the points.
      readjusted = adjust_statistics(student, seen, batch_size=len(seen), devices=workspace.group)
      found = {OWN: self.judged(student, seed), READJUSTED: self.judged(readjusted, seed)}
      taught = self.taught(workspace, seed)["regions"]
      for judged in found.values():
        judged[AGREEMENT] = float(np.mean([a == b for a, b in zip(judged["regions"], taught, strict=True)]))
      return found

    name = "-".join(map(str, (row, statistics, *self.sizes, f"seed{seed}")))
    return workspace.results.once(f"students/{name}", compute)

  def plan(self, table: Table, row: str, column: str) -> CellPlan:
    """How one cell is measured."""
    measure, (statistics, used) = self.measures[table.title], COLUMNS[column]
    learned = "the circles" if row == DATA else "N({1:g}, {0:g}^2)".format(*NOISES[row])
    settings = {"row": row, "noise": NOISES.get(row), "sizes": list(self.sizes), "measure": [measure, column]}
    protocol = (
      f"{measure} of a student of {self.sizes.distillation_steps} steps of {self.sizes.batch_size} from "
      f"{self.sizes.points} points of {learned}, teacher on {statistics} statistics, student used with {used} ones"
    )

    def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
      found = self.distilled(workspace, row, statistics, seed)[used]
      return {"value": found[measure], "count": self.sizes.points if measure == ACCURACY else GRID**2}

    return CellPlan(settings, protocol, compute)

  def measured(self, results: Mapping[str, Results]) -> dict[int, list[tuple[str, str]]]:
    """`{seed: [(row, statistics of the teacher)]}` of all students there are, ascending."""
    found: dict[int, set[tuple[str, str]]] = {}
    for entries in results.values():
      for (row, column), entry in entries.items():
        for seed in entry.records:
          found.setdefault(seed, set()).add((row, COLUMNS[column][0]))
    order = [(row, statistics) for row in (DATA, *NOISES) for statistics in (RUNNING, CURRENT)]
    return {seed: [student for student in order if student in found[seed]] for seed in sorted(found)}

  def report(self, workspace: Workspace, results: Mapping[str, Results]) -> Mapping[str, Any]:
    """Keys of report.json beside the tables: the teacher."""
    taught = [self.taught(workspace, seed) for seed in self.measured(results)]
    outer = np.mean([record["regions"].count("1") / GRID**2 for record in taught])
    accuracy = float(np.mean([record[ACCURACY] for record in taught]))
    note = (
      f"The teacher is right on {accuracy:.2%} of new points. It sees the outer circle on {outer:.0%} of the square: so often "
      "does a constant answer agree with it."
    )
    return {"float": {"top1": accuracy, "count": self.sizes.points}, "notes": [note]}

  def figures(
    self, workspace: Workspace, folder: pathlib.Path, tables: Sequence[Table], results: Mapping[str, Results]
  ) -> dict[str, Picture]:
    """Decision regions of the first seed: a row of panels a noise, the teacher and the four students beside one another."""
    measured = self.measured(results)
    if not measured:
      return {}
    seed, students = next(iter(measured.items()))
    taught = self.taught(workspace, seed)
    points, labels = circles(seed, 300)
    panels: list[RegionPanel | None] = []
    for row in dict.fromkeys(row for row, _ in students):
      noise = as_points(inputs(row, untrained(seed, 0), seed, 300))
      title = "teacher, and what the students saw"
      panels.append(RegionPanel(title, _square(taught["regions"]), noise, ylabel=row))
      for statistics, used in COLUMNS.values():
        if (row, statistics) not in students:
          panels.append(None)
          continue
        judged = self.distilled(workspace, row, statistics, seed)[used]
        title = f"student of {statistics}, {used}\naccuracy {judged[ACCURACY]:.1%}"
        panels.append(RegionPanel(title, _square(judged["regions"]), points, labels))
    path = region_panels(panels, folder / "regions.png", half_side=SHOWN, columns=1 + len(COLUMNS))
    return {
      "Decision regions": Picture(
        path,
        f"Seed {seed}. Colours: which circle the network sees. Left: the teacher, with some of the points that the students "
        "of that row learned from. The others: its students, by the statistics of the teacher's BatchNorm layers and their "
        "own, with points of the circles.",
      )
    }


def _square(regions: str) -> np.ndarray:
  return np.asarray([int(digit) for digit in regions]).reshape(GRID, GRID)


def build(setup: Setup) -> Study:
  """The two tables."""
  measures = {
    "Toy problem: accuracy (%) of students by the noise they saw": ACCURACY,
    "Toy problem: agreement (%) with the teacher over the square": AGREEMENT,
  }
  tables = tuple(
    Table(
      title,
      (DATA, *NOISES),
      tuple(COLUMNS),
      unit=PERCENT,
      note="Columns: statistics of the teacher's BatchNorm layers, then those that the student is used with.",
    )
    for title in measures
  )
  work = _Work(_SIZES[setup.options.preset], measures)
  return Study(
    tables=tables,
    plan=work.plan,
    protocol={
      "teacher": f"two BatchNorm layers; {work.sizes.training_steps} steps, {work.sizes.points} points, a seed each",
      "data used": "students of other rows than data: noise; readjusted ones see the points without labels",
    },
    describe=lambda cells: f"{len({(cell.row, cell.seed) for cell in cells})} pairs of students",
    report=work.report,
    figures=work.figures,
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(Options, args, "python -m experiments.noise.toy_circles", __doc__)
  make = functools.partial(untrained, 0, 0)
  return run_command(lambda: run(options.of_study(), name="toy_circles", build=build, arch="", make=make))


if __name__ == "__main__":
  sys.exit(main())
