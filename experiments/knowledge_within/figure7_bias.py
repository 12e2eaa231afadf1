"""Figure 7 of Haroush et al. (2020): which classes a network sees in synthetic images, and how the rare ones fade.

    python -m weights_conversion --arch resnet20 --source resnet20.th --out networks/resnet20
    python -m experiments.knowledge_within.figure7_bias --network networks/resnet20 --real-data cifar10.npz:train --images 128

The mean prediction over a set of images by class, `soft` (mean of the softmax) and `hard` (share of the images whose largest
logit it is), and two numbers of it, each for growing parts of the set (columns: number of images):

- evenness: its entropy over that of the uniform distribution. 100 % is even, 0 one class alone.
- tail: mass of the least predicted tenth of the classes (at least one) over what it would have if all classes were alike.
  100 % is even, 0 a tail that is never predicted.

Rows: images made from BatchNorm statistics (`bns`), by class (`inception`, evenly many targets a class), by both
(`bns+inception`), Gaussian noise (`gaussian`), and real ones (`real`, evenly many a class where labelled; left out without
--real-data). Row `chance`: expectation for as many labels drawn evenly at random, for hard predictions; few images leave
classes out even if the network prefers none. `figures/classes.png` shows all classes sorted by mass, on a logarithmic
axis where there are more than 30.

Ours, by that command, ResNet-20, 128 images of 120 steps, seed 0, on two cores (AMD EPYC), seconds for what is shown and eight
minutes for the images, which were those of Figure 5: evenness of hard predictions 98.2 BNS, 100.0 I, BNS+I and real, 29.6 G, 98.4
chance; tail 39 BNS, 94 I, BNS+I and real, 0 G, 59 chance. Images of BNS lose their rarest class a little more than chance would,
noise is taken for two classes out of ten. One seed: not more than a hint.

The paper's numbers for this figure are not known to us. At `--preset cpu` 384 images of 120 steps a scheme; `--dry-run`
says how long that takes. Networks with many classes need many images: ImageNet's 1000 several thousand (--images).
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments._harness.launch import relaunch_with_huge_pages

if __name__ == "__main__":
  relaunch_with_huge_pages()

import numpy as np

from experiments._harness.image_sets import Source
from experiments._harness.study import Cell, CellPlan, Setup, Study, StudyOptions, run
from experiments._harness.tables import PERCENT, Results, Table
from kwjax.analysis import panel_figures
from kwjax.analysis.bias import class_mass, evenness, tail_share
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.compression.workspace import GAUSSIAN, REAL, Workspace
from kwjax.runtime import cost
from kwjax.runtime.devices import processes
from kwjax.runtime.evaluate import predict

CHANCE = "chance"
ROWS = (REAL, "bns", "bns+inception", "inception", GAUSSIAN, CHANCE)
SOFT, HARD = "soft", "hard"
_EVENNESS, _TAIL = "evenness", "tail"
_MEASURES = {_EVENNESS: evenness, _TAIL: tail_share}
_DRAWS = 200  # simulated sets behind `chance`; its error is a tenth of the spread of one set
_PARTS = 4


def counts_up_to(images: int) -> tuple[int, ...]:
  """Numbers of images whose predictions are looked at: the whole set, its half, and so on; ascending."""
  return tuple(sorted({max(1, images >> part) for part in range(_PARTS)}))


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with."""

  setup: Setup
  classes: int
  measures: Mapping[str, tuple[str, str]]  # title of a table: measure, kind of prediction

  def source(self, row: str) -> Source:
    """The images of a row."""
    return self.setup.source(row, self.setup.chosen.images)

  def plan(self, table: Table, row: str, column: str) -> CellPlan | None:
    """How one cell is measured."""
    measure, kind = self.measures[table.title]
    count = int(column)
    if row == CHANCE:
      return None if kind == SOFT else _chance(measure, self.classes, count)
    source = self.source(row)
    if row == REAL and self.setup.real_data is not None and count > len(self.setup.real_data):
      return None

    def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
      mass = masses(workspace, source, count, seed)[kind]
      return {"value": min(1.0, _MEASURES[measure](mass)), "mass": mass}

    settings = {"source": source.settings, "count": count}
    return CellPlan(settings, f"{kind} predictions of the first {count} of {source.description}", compute)

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    made = {(cell.row, cell.seed) for cell in cells if cell.row != CHANCE}
    configs = [config for row, _ in made if row != REAL and (config := self.setup.config(row)).is_optimized]
    count = self.setup.chosen.images
    return (
      f"images        {len(configs)} sets of {count}, {max((c.steps for c in configs), default=0)} steps a batch\n"
      + cost.estimate(
        self.setup.network,
        synthesized=sum(count * config.duplicates * config.steps for config in configs),
        trained=0,
        evaluated=len(made) * 2 * count,
      )
    )

  def figures(
    self, workspace: Workspace, folder: pathlib.Path, tables: Sequence[Table], results: Mapping[str, Results]
  ) -> dict[str, pathlib.Path]:
    """All classes by mass over the largest set that was measured of each row, the mean of its seeds; and the tables as curves."""
    panels: dict[str, dict[str, np.ndarray]] = {}
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for table in tables:
      measure, kind = self.measures[table.title]
      for (row, column), entry in results[table.title].items():
        if not entry.records:
          continue
        values = [record["value"] for record in entry.records.values()]
        curves.setdefault(f"{measure}, {kind}", {}).setdefault(row, []).append((int(column), float(np.mean(values))))
        if row != CHANCE:
          # Sorted before the mean: another seed has another rarest class. Columns ascend, so the largest set stays.
          sorted_masses = [np.sort(record["mass"])[::-1] for record in entry.records.values()]
          panels.setdefault(f"{kind} predictions", {})[row] = np.mean(sorted_masses, axis=0)
    if not panels:
      return {}
    return {
      "Classes by mass": panel_figures.class_mass_curves(panels, folder / "classes.png"),
      "Evenness and tail by number of images": panel_figures.share_curves(
        curves, folder / "counts.png", xlabel="images"
      ),
    }


def masses(workspace: Workspace, source: Source, count: int, seed: int) -> dict[str, list[float]]:
  """Soft and hard mean prediction f[k] over the first images of a source; measured once.

  Args:
    workspace: where.
    source: of the images.
    count: how many.
    seed: of the images.
  """

  def compute() -> dict[str, list[float]]:
    workspace.stop_if_asked()
    images = source.images(workspace, seed)[:count]
    found = class_mass(
      processes.gather(
        predict(
          workspace.network,
          images,
          batch_size=workspace.batch_size,
          devices=workspace.group,
          should_stop=workspace.should_stop,
        )
      )
    )
    return {SOFT: found.soft.tolist(), HARD: found.hard.tolist()}

  return workspace.results.once(f"{source.stage('predictions', seed)}-{count}", compute)


def _chance(measure: str, classes: int, count: int) -> CellPlan:
  """Expectation of a measure for `count` labels drawn evenly at random."""

  def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
    drawn = np.random.default_rng(0).multinomial(count, np.full(classes, 1 / classes), size=_DRAWS) / count
    return {"value": min(1.0, float(np.mean([_MEASURES[measure](mass) for mass in drawn]))), "draws": _DRAWS}

  words = f"mean of {_DRAWS} times {count} labels drawn evenly at random"
  return CellPlan({"classes": classes, "count": count, "draws": _DRAWS}, words, compute, seeded=False)


def build(setup: Setup) -> Study:
  """Figure 7 for the network of the command line."""
  titles = {
    f"Figure 7: {setup.network.name}, {measure} (%) of {kind} predictions by number of images": (measure, kind)
    for measure in _MEASURES
    for kind in (SOFT, HARD)
  }
  columns = tuple(map(str, counts_up_to(setup.chosen.images)))
  notes = {
    _EVENNESS: "Entropy of the mean prediction over that of the uniform distribution; 100 is even.",
    _TAIL: "Mass of the least predicted tenth of the classes over its fair share; 100 is even, 0 a lost tail.",
  }
  tables = tuple(
    Table(
      title, tuple(row for row in ROWS if kind == HARD or row != CHANCE), columns, unit=PERCENT, note=notes[measure]
    )
    for title, (measure, kind) in titles.items()
  )
  work = _Work(setup, setup.network.num_classes, titles)
  made = [row for row in setup.options.rows or ROWS if row not in (REAL, CHANCE)]
  return Study(
    tables=tables,
    plan=work.plan,
    protocol={"data used": "rows other than real: none, images come from the network itself"},
    describe=work.describe,
    figures=work.figures,
    need=setup.need([setup.config(row) for row in made] or [setup.config(GAUSSIAN)], distills=False),
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(StudyOptions, args, "python -m experiments.knowledge_within.figure7_bias", __doc__)
  return run_command(lambda: run(options, name="figure7_bias", build=build, arch="resnet44"))


if __name__ == "__main__":
  sys.exit(main())
