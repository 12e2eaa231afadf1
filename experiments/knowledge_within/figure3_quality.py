"""Figure 3 of Haroush et al. (2020): accuracy after distillation (KD) against the number of samples, and against their J_KL.

    python -m weights_conversion --arch resnet20 --source resnet20.th --out networks/resnet20
    python -m experiments.knowledge_within.figure3_quality --network networks/resnet20 \
        --eval-data cifar10.npz:test --real-data cifar10.npz:train --preset cpu

By number: rows N-images, each a set of its own (--sizes); columns: top-1 after KD at 2w4a** (first and last layer 4 bit; --bits
and --first-last choose others) on images made from BatchNorm statistics (`KD-bns`) and on real ones (`KD-real`, left out
without --real-data).

By quality: rows step-T, the same synthesis of BNS images stopped after T steps (--snapshots), from noise to the finished set.
Every set starts from the same pixels and draws the same augmentations, so that one is what another was on its way. Columns:
J_KL of the clean images (BatchNorm in evaluation mode, the input counted as a layer), top-1 after calibration alone at
4w4a, and `KD`: after KD at --bits, which --preset cpu measures when it is named (--columns J_KL KD). The report adds Spearman's
rank correlation of J_KL with each of the two; the paper's claim is that it is negative.

The figure's numbers are not known to us. The paper's Table 2 has for ResNet-44 at 2w4a**, 50 and 4000 images a class: real
90.27 and 91.24, BNS 88.52 and 89.6.

--preset paper: 100, 500, 5000 and 20000 images, 16,000 KD steps; snapshots of 500 images at 0, 10, 30, 100, 300 and 1000
steps. --preset cpu: 32, 128 and 384 images, 120 KD steps of 64; 128 images at 0, 5, 10, 20, 40, 80 and 160 steps at a constant
learning rate. `--dry-run` says how long that takes.

Ours, by that command, ResNet-20 (float 91.64 on 1017 CIFAR-10 test images), seed 0, 26 minutes on two cores (AMD EPYC) that
other work shared. Both claims show; rank correlation of J_KL with top-1 at 4w4a -0.96:

    images    KD-bns   KD-real       steps    0      5      10     20     40     80     160
    32        64.90    63.72         J_KL     .398   .196   .138   .072   .033   .017   .019
    128       72.57    74.14         4w4a     84.46  85.84  85.94  86.43  86.73  87.12  87.22
    384       76.70    78.56
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments._harness.launch import relaunch_with_huge_pages

if __name__ == "__main__":
  relaunch_with_huge_pages()

from experiments._harness.distilled import accuracy_cell, config_for, float_score, quantization_rules
from experiments._harness.image_sets import Source, short_name, synthesized
from experiments._harness.study import Cell, CellPlan, Missing, Setup, Study, StudyOptions, run
from experiments._harness.study_report import top1_results
from experiments._harness.tables import PERCENT, Results, Table, over_seeds
from experiments.knowledge_within.table5_sigma import similarity_of
from kwjax.analysis.correlation import rank_correlation
from kwjax.analysis.curves import CurvePanel, curve_panels
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.compression.workspace import REAL, Workspace
from kwjax.distillation import DistillConfig
from kwjax.errors import KwjaxError
from kwjax.quantization import QuantRules
from kwjax.runtime import cost
from kwjax.runtime.data import ImageData
from kwjax.runtime.reporting.messages import log
from kwjax.synthesis import SynthesisConfig

BY_NUMBER = ("KD-bns", "KD-real")
JKL, CALIBRATED, KD = "J_KL", "4w4a", "KD"
_SIZES: dict[str, tuple[int, ...]] = {"cpu": (32, 128, 384), "paper": (100, 500, 5000, 20000), "smoke": (4, 8)}
_SNAPSHOTS: dict[str, tuple[int, ...]] = {
  "cpu": (0, 5, 10, 20, 40, 80, 160),
  "paper": (0, 10, 30, 100, 300, 1000),
  "smoke": (0, 2),
}
_CPU_SNAPSHOT_IMAGES = 128  # one batch


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
  """Options of Figure 3."""

  sizes: tuple[int, ...] = ()
  """Numbers of images, the rows of the first table. Default: by --preset."""
  snapshots: tuple[int, ...] = ()
  """Steps after which a synthesis is stopped, the rows of the second table. Default: by --preset."""
  bits: str = "2w4a"
  """Precision of the distilled student."""
  first_last: str = "4w4a"
  """Precision of its first convolution and of its classifier; `none` treats them like the rest."""


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with."""

  setup: Setup
  evaluation: ImageData | None
  snapshot_images: int
  rules: QuantRules

  def snapshot(self, step: int) -> Source:
    """Images of the synthesis stopped after some steps."""
    return synthesized(self.setup.network, stopped_after(self.setup, step), self.snapshot_images)

  def plan(self, table: Table, row: str, column: str) -> CellPlan:
    """How one cell is measured."""
    setup = self.setup
    if column in BY_NUMBER:
      count, name = number_of(row), column.removeprefix("KD-")
      source = setup.source(name, count)
      if name == REAL and setup.real_data is not None and len(setup.real_data) < count:
        raise Missing(
          f"{row} of {setup.real_data.name} are not there, it has {len(setup.real_data)}: give fewer --sizes"
        )
      return self.accuracy(source, count, self.rules, config_for(setup, setup.chosen, name))
    source = self.snapshot(number_of(row))
    if column == JKL:
      return CellPlan(
        {"source": source.settings, "measure": JKL},
        f"{source.description}; clean, BatchNorm in evaluation mode",
        similarity_of(source),
      )
    if column == CALIBRATED:
      return self.accuracy(source, self.snapshot_images, QuantRules.parse("4w4a"), None)
    return self.accuracy(source, self.snapshot_images, self.rules, config_for(setup, setup.chosen, "bns"))

  def accuracy(self, source: Source, count: int, rules: QuantRules, config: DistillConfig | None) -> CellPlan:
    """Top-1 of the student calibrated and, with a configuration, fine-tuned on `count` images."""
    first = min(count, self.setup.chosen.images)
    evaluation = self.setup.labelled()
    return accuracy_cell(self.setup, source, rules, config, evaluation=evaluation, calibrate_on=first, tune_on=count)

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    chosen, config = self.setup.chosen, self.setup.config("bns")
    sets = {(cell.row, cell.seed) for cell in cells if cell.column != "KD-real"}
    work = 0
    for row, _ in sets:
      is_snapshot = row.startswith("step-")
      steps, count = (number_of(row), self.snapshot_images) if is_snapshot else (config.steps, number_of(row))
      work += steps * count * config.duplicates
    distilled = sum(cell.column.startswith(KD) for cell in cells)
    labelled = len(self.evaluation) if self.evaluation else 0
    return (
      f"images        {len(sets)} sets; {distilled} fine-tunings of {chosen.distill_steps} steps\n"
      + cost.estimate(
        self.setup.network,
        synthesized=work,
        trained=distilled * chosen.distill_steps * chosen.distill_batch_size,
        evaluated=len(cells) * (labelled + chosen.images),
      )
    )

  def report(self, workspace: Workspace, results: Mapping[str, Results]) -> Mapping[str, Any]:
    """Keys of report.json beside the tables: the fixed ones, and the rank correlations of J_KL with accuracy."""
    by_number, by_quality = results.values()
    rows = tuple(dict.fromkeys(row for row, _ in by_number))
    table = Table("", rows, BY_NUMBER)
    distilled = {
      f"{row}, {column.removeprefix('KD-')}": result
      for column, by_row in top1_results(table, by_number, {c: c for c in BY_NUMBER}).items()
      for row, result in by_row.items()
    }
    found = {column: correlation_with_jkl(by_quality, column) for column in (CALIBRATED, KD)}
    notes = [
      f"Spearman's rank correlation of J_KL with top-1 ({column}) over {count} snapshots: {value:.2f}"
      for column, (value, count) in found.items()
      if value is not None
    ]
    for sentence in notes:
      log(sentence)
    score = None if self.evaluation is None else float_score(workspace, self.evaluation)
    correlations = {column: value for column, (value, _) in found.items()}
    return {
      "float": score,
      "distilled": {self.rules.bits: distilled},
      "rank_correlation_with_jkl": correlations,
      "notes": notes,
    }

  def figures(
    self, workspace: Workspace, folder: pathlib.Path, tables: Sequence[Table], results: Mapping[str, Results]
  ) -> dict[str, pathlib.Path]:
    """Accuracy against the number of images, and against J_KL."""
    numbers, snapshots = tables
    by_number, by_quality = (results[table.title] for table in tables)
    left: dict[str, list[_Point]] = {}
    for column in BY_NUMBER:
      found = {row: percent(by_number, row, column) for row in numbers.rows}
      left[column] = [_Point(number_of(row), *top1, "") for row, top1 in found.items() if top1]
    right: dict[str, list[_Point]] = {}
    for column in (CALIBRATED, KD):
      right[column] = []
      for row in snapshots.rows:
        divergence, top1 = over_seeds(by_quality.get((row, JKL))), percent(by_quality, row, column)
        if divergence is not None and divergence.mean is not None and top1:
          right[column].append(_Point(divergence.mean, *top1, row.removeprefix("step-")))
    drawn = [_panel("images", left), _panel("J_KL (nats); beside the points: steps", right)]
    panels = [panel for panel in drawn if panel.curves]
    if not panels:
      return {}
    return {"Top-1 by number of images and by J_KL": curve_panels(panels, folder / "quality.png")}


class _Point(NamedTuple):
  """A place in the figure: x, top-1 and its standard deviation in percent, the text beside it."""

  x: float
  top1: float
  std: float
  text: str


def _panel(xlabel: str, columns: Mapping[str, Sequence[_Point]]) -> CurvePanel:
  measured = {column: points for column, points in columns.items() if points}
  return CurvePanel(
    xlabel,
    "top-1 (%)",
    {column: ([p.x for p in points], [p.top1 for p in points]) for column, points in measured.items()},
    log="x",
    points={column: [p.text for p in points] for column, points in measured.items()},
    spread={column: [p.std for p in points] for column, points in measured.items()},
  )


def stopped_after(setup: Setup, step: int) -> SynthesisConfig:
  """The BNS synthesis of the preset, stopped after some steps: the steps before do not depend on where it stops.

  A cosine schedule and drops that are moved would, so the published schedule keeps its drops and the short one has none. The
  short one starts from noise as well, where J_KL is high.
  """
  config = setup.config("bns")
  if setup.options.preset != "paper":
    config = config.replace(schedule="drops", drops=(), init="randn")
  return config.replace(steps=step)


def number_of(row: str) -> int:
  """N of N-images or of step-N."""
  return int(row.removeprefix("step-").removesuffix("-images"))


def percent(results: Results, row: str, column: str) -> tuple[float, float] | None:
  """Mean and standard deviation of a cell of accuracies in percent, 0 for one seed; None where nothing was measured."""
  found = over_seeds(results.get((row, column)))
  return None if found is None or found.mean is None else (100 * found.mean, 100 * (found.std or 0.0))


def correlation_with_jkl(results: Results, column: str) -> tuple[float | None, int]:
  """Spearman's rank correlation of J_KL with a column over the snapshots that have both, and their number."""
  pairs = []
  for row in dict.fromkeys(row for row, _ in results):
    divergence, other = over_seeds(results.get((row, JKL))), over_seeds(results.get((row, column)))
    if divergence is not None and other is not None and divergence.mean is not None and other.mean is not None:
      pairs.append((divergence.mean, other.mean))
  return rank_correlation([x for x, _ in pairs], [y for _, y in pairs]), len(pairs)


def build(setup: Setup) -> Study:
  """Figure 3 for the network of the command line."""
  options = setup.options
  assert isinstance(options, Options)
  chosen = tuple(sorted(set(options.sizes or _SIZES[options.preset])))
  steps = tuple(sorted(set(options.snapshots or _SNAPSHOTS[options.preset])))
  if chosen[0] < 1:
    raise KwjaxError(f"--sizes must be at least 1, found {chosen[0]}")
  if steps[0] < 0:
    raise KwjaxError(f"--snapshots must be at least 0, found {steps[0]}")
  snapshot_images = setup.chosen.images
  if options.preset == "cpu" and options.images is None:
    snapshot_images = min(snapshot_images, _CPU_SNAPSHOT_IMAGES)
  evaluation = setup.eval_data if setup.eval_data is not None and setup.eval_data.labels is not None else None
  rules = quantization_rules(setup, options.bits, options.first_last)
  work = _Work(setup, evaluation, snapshot_images, rules)
  tables = (
    Table(
      title=f"Figure 3: {setup.network.name}, top-1 (%) after distillation at {rules.bits} by number of images",
      rows=tuple(f"{count}-images" for count in chosen),
      columns=BY_NUMBER,
      note="The figure's numbers are not known to us.",
    ),
    Table(
      title=f"Figure 3: {setup.network.name}, a synthesis stopped after some steps: J_KL, and top-1 on its images",
      rows=tuple(f"step-{step}" for step in steps),
      columns=(JKL, CALIBRATED, KD),
      unit={JKL: "nats", CALIBRATED: PERCENT, KD: PERCENT},
      optional=(KD,) if options.preset == "cpu" else (),
      note=f"{snapshot_images} BNS images; 4w4a: calibrated alone, all layers; KD: distilled at {rules.bits}.",
    ),
  )
  named = f"{len(evaluation)} of {short_name(evaluation)}; used for nothing else" if evaluation else "none"
  return Study(
    tables=tables,
    plan=work.plan,
    protocol={
      "data used": "columns other than real: none, images come from the network itself",
      "evaluation images": named,
      "student": rules.describe(),
    },
    describe=work.describe,
    report=work.report,
    figures=work.figures,
    need=setup.need([setup.config("bns")], distills=True),
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(Options, args, "python -m experiments.knowledge_within.figure3_quality", __doc__)
  return run_command(lambda: run(options, name="figure3_quality", build=build, arch="resnet44"))


if __name__ == "__main__":
  sys.exit(main())
