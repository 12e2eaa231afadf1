"""Ways to calibrate a network without its data, side by side: ranges of activations and weights, bias correction, equalization.

    python -m weights_conversion --arch resnet44 --source resnet44.th --out networks/resnet44
    python -m experiments.calibration.table_calibration --network networks/resnet44 \\
        --eval-data cifar10.npz:test --real-data cifar10.npz:train --images 128
    python -m experiments.calibration.table_calibration --bits 4w8a --eval-data imagenet_samples_500.zip --images 32

The second runs on the embedded EfficientNet-Lite0 (extra `demo`).

Rows: `paper`: ranges from the extremes of each sample, averaged (Haroush et al. 2020). `percentile`: 99.99 % of all values of a
layer. `mse`: the range with the least squared error. `entropy`: the least KL, as TensorRT does it. `weights-mse`: each channel's
weights keep the part of their range with the least squared error. `bias`: the mean of every channel is brought back to the
float network's (Nagel et al. 2019). `moments`: BatchNorm's variances as well. `equalized`: scale is moved between neighbouring
layers where that changes nothing (Nagel et al. 2019). `+`: both. Columns: images that calibrate: real ones (a comparison; left
out without --real-data), images made from BatchNorm statistics (`bns`), Gaussian noise (`gaussian`). Two tables: top-1, and
KL(float || quantized) on the same images, which tells methods apart where top-1 cannot.

No published numbers.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments._harness.launch import relaunch_with_huge_pages

if __name__ == "__main__":
  relaunch_with_huge_pages()

import numpy as np

from experiments._harness.distilled import quantization_rules
from experiments._harness.image_sets import Source, digest, identity, short_name
from experiments._harness.study import Cell, CellPlan, Setup, Study, StudyOptions, run
from experiments._harness.tables import Table
from experiments.calibration.scored import NO_PART, protocol, report, scored, tables, value_in, with_draws
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.compression.student import calibrated
from kwjax.compression.workspace import CALIBRATION_KEY, GAUSSIAN, REAL, Workspace, stream_key
from kwjax.quantization import QuantRules
from kwjax.quantization.methods import PAPER, Method
from kwjax.runtime import cost
from kwjax.runtime.data import ImageData

METHODS: dict[str, Method] = {
  "paper": PAPER,
  "percentile": Method("percentile"),
  "percentile-99.9": Method("percentile:99.9"),
  "mse": Method("mse"),
  "entropy": Method("entropy"),
  "weights-mse": Method(weights_range="mse"),
  "bias": Method(corrects_bias=True),
  "equalized": Method(equalizes=True),
  "percentile-99.9+bias": Method("percentile:99.9", corrects_bias=True),
  "mse+bias": Method("mse", corrects_bias=True),
  "weights-mse+bias": Method(weights_range="mse", corrects_bias=True),
  "equalized+bias": Method(corrects_bias=True, equalizes=True),
  "mse+equalized+bias": Method("mse", corrects_bias=True, equalizes=True),
  "mse+weights-mse+bias": Method("mse", "mse", corrects_bias=True),
  "moments": Method(corrects_bias=True, corrects_variance=True),
  "mse+moments": Method("mse", corrects_bias=True, corrects_variance=True),
  "weights-mse+moments": Method(weights_range="mse", corrects_bias=True, corrects_variance=True),
  "mse+weights-mse+moments": Method("mse", "mse", corrects_bias=True, corrects_variance=True),
}
COLUMNS = (REAL, "bns", GAUSSIAN)


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
  """Options of this study."""

  bits: str = "4w4a"
  """Precision, #w#a."""
  first_last: str = "none"
  """Precision of the first convolution and of the classifier; `none` treats them like the rest."""
  weight_scheme: Literal["auto", "integer", "affine", "affine0", "sym", "symfull", "midrise"] = "auto"
  """Grid of the weights; auto: affine from 4 bits on, which has no integer form; affine0, sym and symfull have one."""


def _settings(method: Method) -> dict[str, Any]:
  """What tells a method from others; one that leaves variances alone is what it was before there was that choice."""
  settings = {name: value for name, value in method._asdict().items() if name not in NO_PART}
  return {name: value for name, value in settings.items() if name != "corrects_variance" or value}


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with; `logits` keeps the float network's, made once."""

  setup: Setup
  evaluation: ImageData
  rules: QuantRules
  logits: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def plan(self, table: Table, row: str, column: str) -> CellPlan:
    """How one cell is measured."""
    source, method, chosen = self.setup.source(column, self.setup.chosen.images), METHODS[row], self.setup.chosen
    rules = method.applied(self.rules)
    settings = {
      "source": source.settings,
      "rules": rules.to_json(),
      "method": _settings(method),
      "calibration": [chosen.images, chosen.calibration_steps, chosen.calibration_batch],
      "evaluation": identity(self.evaluation),
    }
    parts = [rules.describe(), *([method.describe()] if method.describe() else [])]
    how = "" if rules.needs_histograms else f" for {chosen.calibration_steps} x {chosen.calibration_batch} draws"
    protocol = (
      f"{', '.join(parts)}; {source.description}{how}; {len(self.evaluation)} images of {short_name(self.evaluation)}"
    )
    value = value_in(table, column)

    def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
      name = f"methods/{digest([row, column, settings])}-seed{seed}"
      found = workspace.results.once(name, lambda: self._measure(workspace, source, method, seed))
      return {"value": found[value], "count": len(self.evaluation), "images": found["images"]}

    return CellPlan(settings, protocol, compute)

  def _measure(self, workspace: Workspace, source: Source, method: Method, seed: int) -> dict[str, Any]:
    images = source.images(workspace, seed)[: self.setup.chosen.images]
    student = calibrated(
      workspace,
      f"{source.stage('ranges', seed)}-{len(images)}",
      images,
      self.rules,
      with_draws(method, self.setup.chosen),
      key=stream_key(seed, CALIBRATION_KEY),
      description=source.name,
    )
    return {**scored(workspace, student, self.evaluation, self.logits), "images": len(images)}

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    chosen = self.setup.chosen
    made = {(cell.column, cell.seed) for cell in cells if cell.column not in (REAL, GAUSSIAN)}
    config = self.setup.config("bns")
    students = len({(cell.row, cell.column, cell.seed) for cell in cells})
    return f"images        {len(made)} sets of {chosen.images}, {config.steps} steps a batch\n" + cost.estimate(
      self.setup.network,
      synthesized=len(made) * chosen.images * config.duplicates * config.steps,
      trained=0,
      evaluated=students * (len(self.evaluation) + 2 * chosen.images),
    )


def build(setup: Setup) -> Study:
  """The study for the network of the command line."""
  options, evaluation = setup.options, setup.labelled()
  assert isinstance(options, Options)
  rules = quantization_rules(setup, options.bits, options.first_last, weights=options.weight_scheme)
  work = _Work(setup, evaluation, rules)
  shown = tables(f"Calibration of {setup.network.name} {rules.bits}", tuple(METHODS), COLUMNS, "+: both.")
  return Study(
    tables=shown,
    plan=work.plan,
    protocol=protocol(evaluation),
    describe=work.describe,
    report=lambda workspace, results: report(workspace, evaluation, results, shown[0]),
    need=setup.need([setup.config("bns")], distills=False),
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(Options, args, "python -m experiments.calibration.table_calibration", __doc__)
  return run_command(
    lambda: run(options, name="table_calibration", build=build, arch="resnet44", default="efficientnet_lite0")
  )


if __name__ == "__main__":
  sys.exit(main())
