"""What Tables 2 and 3 of Haroush et al. (2020) share: top-1 after calibration and after distillation, by data source and bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments._harness.distilled import accuracy_cell, float_score
from experiments._harness.image_sets import short_name
from experiments._harness.study import Cell, CellPlan, Missing, Setup, Study, StudyOptions
from experiments._harness.study_report import top1_results
from experiments._harness.tables import Results, Table
from kwjax.cli.options import ByPreset
from kwjax.compression.workspace import GAUSSIAN, REAL, Workspace
from kwjax.quantization import QuantRules
from kwjax.runtime import cost
from kwjax.runtime.data import ImageData

ROWS = (REAL, "bns", "inception", "bns+inception", GAUSSIAN)
KD = "KD-"
"""What the names of columns begin with that are measured after distillation."""

Published = Mapping[str, tuple[float | None, ...]]
"""`{column: the paper's top-1 (%) of ROWS}`, None where it is not known to us."""


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
  """Options of Tables 2 and 3."""

  distill_images: ByPreset = None
  """Images to fine-tune on. Default: the paper's number under --preset paper, else as many as to calibrate with."""


@dataclasses.dataclass(frozen=True)
class Column:
  """What is measured in a column.

  Attributes:
    rules: bits of every layer.
    distill_images: how many images the student is fine-tuned on after its calibration; None: it is not.
    missing: why the column cannot be measured with these options, or None.
  """

  rules: QuantRules
  distill_images: int | None = None
  missing: str | None = None


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells of the table are measured with."""

  setup: Setup
  evaluation: ImageData
  columns: Mapping[str, Column]

  def count(self, column: str) -> int:
    """Images of a source in a column: a set serves calibration and the first distillation alike."""
    first = next((c.distill_images for c in self.columns.values() if c.distill_images is not None), 0)
    return max(self.setup.chosen.images, first, self.columns[column].distill_images or 0)

  def plan(self, table: Table, row: str, column: str) -> CellPlan:
    """How one cell is measured."""
    chosen, rules = self.setup.chosen, self.columns[column].rules
    if (missing := self.columns[column].missing) is not None:
      raise Missing(missing)
    source = self.setup.source(row, self.count(column))
    distill_images = self.columns[column].distill_images
    config = None
    if distill_images is not None:
      config = self.setup.distill_config(chosen, row)
    return accuracy_cell(
      self.setup,
      source,
      rules,
      config,
      evaluation=self.evaluation,
      calibrate_on=chosen.images,
      tune_on=distill_images or 0,
    )

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    chosen = self.setup.chosen
    made = {(cell.row, cell.seed, self.count(cell.column)) for cell in cells if cell.row not in (REAL, GAUSSIAN)}
    sets = [(self.setup.config(row), count) for row, _, count in made]
    distilled = sum(self.columns[cell.column].distill_images is not None for cell in cells)
    trained = distilled * chosen.distill_steps * chosen.distill_batch_size
    synthesized = sum(count * config.duplicates * config.steps for config, count in sets)
    evaluated = len(cells) * len(self.evaluation) + len({(c.row, c.seed) for c in cells}) * chosen.images
    steps = max((config.steps for config, _ in sets), default=0)
    sizes = " and ".join(f"{count}" for count in sorted({count for _, count in sets}))
    return (
      f"images        {len(made)} sets of {sizes or 0}, {steps} steps a batch; {distilled} fine-tunings of "
      f"{chosen.distill_steps} steps of {chosen.distill_batch_size}\n"
      + cost.estimate(self.setup.network, synthesized=synthesized, trained=trained, evaluated=evaluated)
    )

  def report(self, workspace: Workspace, results: Mapping[str, Results]) -> Mapping[str, Any]:
    """Keys of report.json beside the tables."""
    ((title, found),) = results.items()
    table = Table(title, ROWS, tuple(self.columns))
    distilled = {c: c.removeprefix(KD) for c, column in self.columns.items() if column.distill_images is not None}
    calibrated = {c: c for c in self.columns if c not in distilled}
    return {
      "float": float_score(workspace, self.evaluation),
      "calibrated": top1_results(table, found, calibrated),
      "distilled": top1_results(table, found, distilled),
    }


def study(
  setup: Setup, *, title: str, columns: Mapping[str, Column], published: Published, optional: Sequence[str], note: str
) -> Study:
  """A table of top-1 with one row a data source.

  Args:
    setup: network, data and sizes.
    title: of the table.
    columns: by name, in order; those that distill begin with `KD`.
    published: the paper's numbers of this network.
    optional: columns that are measured on demand.
    note: below the table.

  Raises:
    Missing: there are no labelled images.
  """
  options, evaluation = setup.options, setup.labelled()
  work = _Work(setup, evaluation, columns)
  table = Table(
    title=title,
    rows=ROWS,
    columns=tuple(columns),
    paper={
      (row, column): value
      for column, values in published.items()
      for row, value in zip(ROWS, values, strict=True)
      if value is not None
    },
    optional=tuple(optional),
    note=note,
  )
  rows = [row for row in options.rows or ROWS if row not in (REAL, GAUSSIAN)]
  named = [c for c in options.columns or [c for c in columns if c not in table.optional] if c in columns]
  largest = max([setup.chosen.images, *map(work.count, named)])
  sized = setup._replace(chosen=dataclasses.replace(setup.chosen, images=largest))
  return Study(
    tables=(table,),
    plan=work.plan,
    protocol={
      "data used": "rows other than real: none, images come from the network itself",
      "evaluation images": f"{len(evaluation)} of {short_name(evaluation)}; used for nothing else",
    },
    describe=work.describe,
    report=work.report,
    need=sized.need(
      [setup.config(row) for row in rows] or [setup.config(GAUSSIAN)],
      distills=any(columns[c].distill_images is not None for c in named),
    ),
  )
