"""What each step towards few bits brings, and with which images: ranges, corrections, block reconstruction, fine-tuning.

    python -m weights_conversion --arch resnet20 --source resnet20.th --out networks/resnet20
    python -m experiments.calibration.table_reconstruction --network networks/resnet20 --bits 2w4a --first-last 4w4a \\
        --eval-data cifar10.npz:test --real-data cifar10.npz:train
    python -m experiments.calibration.table_reconstruction --eval-data imagenet_samples_500.zip --images 128

The last runs on the embedded EfficientNet-Lite0 (extra `demo`).

Rows:

    ranges                    calibrated, nothing else
    means, moments            BatchNorm's means, or means and variances, are corrected (Nagel et al. 2019)
    reconstructed             rounding and ranges are chosen block by block (AdaRound, BRECQ, QDrop)
    reconstructed+means       then the means are corrected
    reconstructed+moments     then the means and variances
    fine-tuned                moments, then SGD on the KL from the float network
    reconstructed+fine-tuned  reconstructed, then the same SGD

Columns:

    real       real images, for comparison; left out without --real-data
    bns        images made from BatchNorm statistics
    bns+swing  the same with swing convolutions
    gaussian   Gaussian noise

Two tables: top-1, and KL(float || quantized) on the same images.

Published for real ImageNet images, first and last layer in 8 bits, 1,024 images, 20,000 iterations a block (QDrop, Wei et al.
2022): ResNet-18, float 71.06, has 69.13 at 4w4a and 64.38 at 2w4a; MobileNetV2, float 72.49, has 67.83 and 54.29.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from experiments._harness.launch import relaunch_with_huge_pages

if __name__ == "__main__":
  relaunch_with_huge_pages()

import numpy as np

from experiments._harness.distilled import quantization_rules
from experiments._harness.image_sets import Source, digest, identity, short_name, synthesized
from experiments._harness.study import Cell, CellPlan, Setup, Study, StudyOptions, run
from experiments._harness.tables import Table
from experiments.calibration.scored import protocol, report, scored, tables, value_in, with_draws
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.cli.options import ByPreset, overrides_of
from kwjax.compression import student
from kwjax.compression.workspace import (
  CALIBRATION_KEY,
  DISTILL_KEY,
  GAUSSIAN,
  REAL,
  RECONSTRUCT_KEY,
  Workspace,
  stream_key,
)
from kwjax.distillation import DistillConfig
from kwjax.quantization import QuantizedNetwork, QuantRules
from kwjax.quantization.methods import BEST, Correction
from kwjax.reconstruction import ReconstructConfig
from kwjax.runtime import cost
from kwjax.runtime.data import ImageData


class Steps(NamedTuple):
  """What a row does behind the ranges, in this order.

  Attributes:
    reconstructs: block by block.
    correction: of the moments.
    tunes: by SGD.
  """

  reconstructs: bool = False
  correction: Correction = "none"
  tunes: bool = False


STEPS: Mapping[str, Steps] = {
  "ranges": Steps(),
  "means": Steps(correction="means"),
  "moments": Steps(correction="moments"),
  "reconstructed": Steps(reconstructs=True),
  "reconstructed+means": Steps(reconstructs=True, correction="means"),
  "reconstructed+moments": Steps(reconstructs=True, correction="moments"),
  "fine-tuned": Steps(correction="moments", tunes=True),
  "reconstructed+fine-tuned": Steps(reconstructs=True, tunes=True),
}
SWING = "bns+swing"
COLUMNS = (REAL, "bns", SWING, GAUSSIAN)
_FEW_ITERATIONS, _FEW_ROWS = 100, 8  # of a network on large images, for which the presets have no reconstruction


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
  """Options of this study."""

  bits: str = "4w4a"
  """Precision, #w#a."""
  first_last: str = "8w8a"
  """Precision of the first convolution and of the classifier; `none` treats them like the rest."""
  weight_scheme: Literal["auto", "integer", "affine", "affine0", "sym", "symfull", "midrise"] = "integer"
  """Grid of the weights; auto: affine from 4 bits on, which has no integer form."""
  overrides: tuple[str, ...] = ()
  """Exceptions to --bits, each PATTERN=BITS: a layer path, a regular expression, or `1x1` (1x1=8w8a)."""
  reconstruct_iterations: ByPreset = None
  """Iterations a block."""
  reconstruct_batch_size: ByPreset = None
  """Images in each of them."""


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with; `logits` keeps the float network's, made once."""

  setup: Setup
  evaluation: ImageData
  rules: QuantRules
  config: ReconstructConfig
  logits: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def source(self, column: str) -> Source:
    """Images of a column."""
    if column != SWING:
      return self.setup.source(column, self.setup.chosen.images)
    swinging = self.setup.config("bns").replace(swing=True)
    made = synthesized(self.setup.network, swinging, self.setup.chosen.images)
    return made._replace(description=f"{made.description} with swing convolutions")

  def tuning(self, column: str) -> DistillConfig:
    """Settings of the fine-tuning."""
    return self.setup.distill_config(self.setup.chosen, "bns" if column == SWING else column)

  def plan(self, table: Table, row: str, column: str) -> CellPlan:
    """How one cell is measured."""
    source, chosen = self.source(column), self.setup.chosen
    rules = BEST.applied(self.rules)
    row_steps = STEPS[row]
    settings = {
      "source": source.settings,
      "rules": rules.to_json(),
      "calibration": [chosen.images, chosen.calibration_steps, chosen.calibration_batch],
      "reconstruction": self.config.to_json() if row_steps.reconstructs else None,
      "distillation": self.tuning(column).to_json() if row_steps.tunes else None,
      "evaluation": identity(self.evaluation),
    }
    how = f", {self.config.iterations} iterations of {self.config.batch_size} a block" if row_steps.reconstructs else ""
    how += f", {self.tuning(column).steps} steps of {self.tuning(column).batch_size}" if row_steps.tunes else ""
    described = f"{rules.describe()}; {row}{how}; {source.description}; "
    described += f"{len(self.evaluation)} images of {short_name(self.evaluation)}"
    value = value_in(table, column)

    def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
      name = f"steps/{digest([row, column, settings])}-seed{seed}"
      found = workspace.results.once(name, lambda: self._measure(workspace, source, row, column, seed))
      return {"value": found[value], "count": len(self.evaluation), "images": found["images"]}

    return CellPlan(settings, described, compute)

  def _measure(self, workspace: Workspace, source: Source, row: str, column: str, seed: int) -> dict[str, Any]:
    images = source.images(workspace, seed)[: self.setup.chosen.images]
    made: QuantizedNetwork = student.uncorrected(
      workspace,
      f"{source.stage('ranges', seed)}-{len(images)}",
      images,
      self.rules,
      with_draws(BEST, self.setup.chosen),
      key=stream_key(seed, CALIBRATION_KEY),
      description=source.name,
    )
    steps, reference = STEPS[row], made.network
    if steps.reconstructs:
      key = stream_key(seed, RECONSTRUCT_KEY)
      # Four rows go on from it, so it is kept beside their own folders.
      name = digest([source.settings, made.rules.to_json(), self.config.to_json(), seed])
      kept = workspace._replace(scratch=workspace.folder / "reconstructions")
      made, _ = student.reconstructed(kept, made, images, self.config, reference=reference, key=key, name=name)
    made = student.corrected(workspace, made, images, steps.correction, reference=reference)
    if steps.tunes:
      made = student.fine_tuned(workspace, made, images, self.tuning(column), key=stream_key(seed, DISTILL_KEY))
    return {**scored(workspace, made, self.evaluation, self.logits), "images": len(images)}

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    chosen, config = self.setup.chosen, self.setup.config("bns")
    made = {(cell.column, cell.seed) for cell in cells if cell.column not in (REAL, GAUSSIAN)}
    students = {(cell.row, cell.column, cell.seed) for cell in cells}
    tuned = sum(STEPS[row].tunes for row, _, _ in students)
    blocks = len({(column, seed) for row, column, seed in students if STEPS[row].reconstructs})
    lines = (
      f"images        {len(made)} sets of {chosen.images}, {config.steps} steps a batch; {tuned} fine-tunings of "
      f"{chosen.distill_steps} steps; {blocks} reconstructions of {self.config.iterations} iterations a block\n"
    )
    return lines + cost.estimate(
      self.setup.network,
      synthesized=len(made) * chosen.images * config.duplicates * config.steps,
      # An iteration of all blocks costs about what a step of the whole network costs.
      trained=tuned * chosen.distill_steps * chosen.distill_batch_size
      + blocks * self.config.iterations * self.config.batch_size,
      evaluated=len(students) * (len(self.evaluation) + 2 * chosen.images),
    )


def build(setup: Setup) -> Study:
  """The study for the network of the command line."""
  options, evaluation = setup.options, setup.labelled()
  assert isinstance(options, Options)
  rules = quantization_rules(
    setup,
    options.bits,
    options.first_last,
    weights=options.weight_scheme,
    overrides=overrides_of(options.overrides),
  )
  chosen = setup.chosen
  iterations = options.reconstruct_iterations or chosen.reconstruct_iterations or _FEW_ITERATIONS
  batch_size = options.reconstruct_batch_size or (
    chosen.reconstruct_batch_size if chosen.reconstruct_iterations else _FEW_ROWS
  )
  work = _Work(setup, evaluation, rules, ReconstructConfig(iterations=iterations, batch_size=batch_size))
  shown = tables(f"Steps to {setup.network.name} {rules.bits}", tuple(STEPS), COLUMNS, "+: one after the other.")
  return Study(
    tables=shown,
    plan=work.plan,
    protocol=protocol(evaluation),
    describe=work.describe,
    report=lambda workspace, results: report(workspace, evaluation, results, shown[0]),
    need=setup.need([setup.config("bns")], distills=True),
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(Options, args, "python -m experiments.calibration.table_reconstruction", __doc__)
  return run_command(
    lambda: run(options, name="table_reconstruction", build=build, arch="resnet20", default="efficientnet_lite0")
  )


if __name__ == "__main__":
  sys.exit(main())
