"""Table 1 of Haroush et al. (2020): what intermediate losses (IQ) and mixup (Mix) add to distillation, by number of samples.

    python -m weights_conversion --arch resnet44 --source resnet44.th --out networks/resnet44
    python -m experiments.knowledge_within.table1_ablation --network networks/resnet44 \
        --eval-data cifar10.npz:test --real-data cifar10.npz:train --preset paper

Rows: images a class (--samples), each a set of its own. Columns: the loss, top-1 at 2w4a** (first and last layer 4 bit;
--bits and --first-last choose others) after distillation. KD: KL to the teacher's probabilities; IQ: --iq-weight times the
smooth-L1 distance of the outputs of both networks' stages, summed over their elements; Mix: every image mixed half and half
with another one, which both networks see. All else is equal: images, calibration, seeds, schedule. --source says where the
images come from: `real` where --real-data is given, `bns` (made out of the network) otherwise.

The paper's top-1 (%) as far as it is known to us, ResNet-44 (float 93.23). We read its samples as images a class: in all, one
sample could be mixed with nothing but itself.

    samples      1       10      100     1000    2000
    KD           76.32   81.12   80.16   84.03   85.41
    KD+IQ+Mix    83.68   85.44   85.95   87.28   88.36

--preset paper: the rows above, 16,000 steps of 256 images, rate 0.1. --preset cpu: 40 images a class, 400 steps of 64, rate 0.01
(0.1 is too large for so few steps); for ResNet-20 on two cores about 20 minutes for the four columns of a seed (0.35 to 0.5 s a
step, a minute of compilation a column):

    python -m weights_conversion --arch resnet20 --source resnet20.th --out networks/resnet20
    python -m experiments.knowledge_within.table1_ablation --network networks/resnet20 --eval-data cifar10.npz:test --preset cpu

The paper's claim is KD < KD+IQ < KD+IQ+Mix; the report says for every row whether it shows.

Ours, ResNet-20 (float 91.64 on 1017 CIFAR-10 test images), real images (--real-data), `--samples 10 40 --distill-steps 300`,
seed 0, two minutes a cell on two cores (AMD EPYC); standard error of one top-1 1.1 to 1.4 points:

    samples      10      40
    KD           72.47   80.63
    KD+IQ        86.14   88.20
    KD+Mix       78.47   81.91
    KD+IQ+Mix    83.48   84.86

IQ is worth most of it; mixup helps KD alone, and takes from KD+IQ in so few steps. IQ is a sum over the elements of a stage here:
as a mean (`--iq-reduction mean`) its gradient has 0.00004 of the length of KL's, and KD+IQ is KD (74.04 and 77.88).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments._harness.launch import relaunch_with_huge_pages

if __name__ == "__main__":
  relaunch_with_huge_pages()

from experiments._harness.distilled import accuracy_cell, config_for, float_score, quantization_rules
from experiments._harness.image_sets import short_name
from experiments._harness.study import Cell, CellPlan, Missing, Setup, Study, StudyOptions, run
from experiments._harness.study_report import top1_results
from experiments._harness.tables import Results, Table, over_seeds
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.compression.workspace import GAUSSIAN, REAL, Workspace
from kwjax.distillation import Mixup
from kwjax.errors import KwjaxError
from kwjax.quantization import QuantRules
from kwjax.runtime import cost
from kwjax.runtime.data import ImageData
from kwjax.runtime.reporting.messages import log

# Column: whether IQ is in the loss, whether images are mixed.
COLUMNS: dict[str, tuple[bool, bool]] = {
  "KD": (False, False),
  "KD+IQ": (True, False),
  "KD+Mix": (False, True),
  "KD+IQ+Mix": (True, True),
}
ORDER = ("KD", "KD+IQ", "KD+IQ+Mix")
_SAMPLES: dict[str, tuple[int, ...]] = {"cpu": (40,), "paper": (1, 10, 100, 1000, 2000), "smoke": (1, 2)}
_CPU_STEPS = 400
PAPER = {
  "KD": {1: 76.32, 10: 81.12, 100: 80.16, 1000: 84.03, 2000: 85.41},
  "KD+IQ+Mix": {1: 83.68, 10: 85.44, 100: 85.95, 1000: 87.28, 2000: 88.36},
}
"""The paper's top-1 (%) of ResNet-44 by column and images a class."""


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
  """Options of Table 1."""

  samples: tuple[int, ...] = ()
  """Numbers of images a class, the rows. Default: by --preset."""
  source: Literal["real", "bns", "inception", "bns+inception", "gaussian"] | None = None
  """Where the images come from. Default: real where --real-data is given, else bns."""
  iq_weight: float = 1e-3
  """Weight of IQ beside KL in the columns that have it (published: 1e-3 in section 4.2, 1e-2 in the appendix)."""
  iq_reduction: Literal["sum", "mean"] = "sum"
  """Over the elements of a stage's output. With the mean the published weight has no effect: 4e-5 of KL's gradient."""
  bits: str = "2w4a"
  """Precision of the student."""
  first_last: str = "4w4a"
  """Precision of its first convolution and of its classifier; `none` treats them like the rest."""


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with."""

  setup: Setup
  evaluation: ImageData
  source: str
  iq_weight: float
  iq_reduction: Literal["sum", "mean"]
  rules: QuantRules

  def count(self, row: str) -> int:
    """Images of a row."""
    return int(row) * self.setup.network.num_classes

  def plan(self, table: Table, row: str, column: str) -> CellPlan:
    """How one cell is measured."""
    count, setup = self.count(row), self.setup
    source = setup.source(self.source, count)
    if self.source == REAL and setup.real_data is not None and len(setup.real_data) < count:
      raise Missing(
        f"row {row} needs {count} real images and {setup.real_data.name} has {len(setup.real_data)}: give --real-data with "
        "more, or fewer --samples"
      )
    has_iq, is_mixed = COLUMNS[column]
    config = config_for(
      setup,
      setup.chosen,
      self.source,
      iq_weight=self.iq_weight if has_iq else 0.0,
      iq_reduction=self.iq_reduction if has_iq else "mean",
      mixup=Mixup(lam=0.5) if is_mixed else None,
    )
    weight = f" (IQ weight {self.iq_weight:g} of the {self.iq_reduction})" if has_iq else ""
    return accuracy_cell(
      setup,
      source,
      self.rules,
      config,
      evaluation=self.evaluation,
      calibrate_on=min(count, setup.chosen.images),
      tune_on=count,
      description=f"{column}{weight}, ",
    )

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    chosen = self.setup.chosen
    rows = [row for row, _ in {(cell.row, cell.seed) for cell in cells}]
    made = 0 if self.source in (REAL, GAUSSIAN) else sum(self.count(row) for row in rows)
    config = self.setup.config("bns" if self.source == REAL else self.source)
    return (
      f"images        {made} {self.source} images to make, {config.steps} steps a batch; {len(cells)} fine-tunings of "
      f"{chosen.distill_steps} steps of {chosen.distill_batch_size}\n"
      + cost.estimate(
        self.setup.network,
        synthesized=made * config.duplicates * config.steps,
        trained=len(cells) * chosen.distill_steps * chosen.distill_batch_size,
        evaluated=len(cells) * (len(self.evaluation) + chosen.images),
      )
    )

  def report(self, workspace: Workspace, results: Mapping[str, Results]) -> Mapping[str, Any]:
    """Keys of report.json beside the table: the fixed ones, and whether the paper's ordering shows."""
    ((title, found),) = results.items()
    rows = tuple(dict.fromkeys(row for row, _ in found))
    distilled = {
      f"{row} a class, {column}": result
      for column, by_row in top1_results(Table(title, rows, tuple(COLUMNS)), found, {c: c for c in COLUMNS}).items()
      for row, result in by_row.items()
    }
    notes = [sentence for row in rows if (sentence := ordering(found, row, len(self.evaluation))) is not None]
    for sentence in notes:
      log(sentence)
    return {"float": float_score(workspace, self.evaluation), "distilled": {self.rules.bits: distilled}, "notes": notes}


def ordering(results: Results, row: str, count: int) -> str | None:
  """Whether KD < KD+IQ < KD+IQ+Mix in one row, with the numbers; None where one of them was not measured.

  Args:
    results: of the table, in fractions.
    row: of the table.
    count: test images, for the standard error of one top-1.
  """
  found = [over_seeds(results.get((row, column))) for column in ORDER]
  means = [entry.mean for entry in found if entry is not None and entry.mean is not None]
  if len(means) < len(ORDER):
    return None
  holds = means[0] < means[1] < means[2]
  error = (means[0] * (1 - means[0]) / count) ** 0.5
  seeds = min(len(entry.seeds) for entry in found if entry is not None)
  numbers = ", ".join(f"{column} {mean:.2%}" for column, mean in zip(ORDER, means))
  return (
    f"{row} images a class, {seeds} seed{'s' if seeds > 1 else ''}: the paper's {' < '.join(ORDER)} "
    f"{'shows' if holds else 'does not show'}: {numbers}; a standard error of one top-1 is {error:.2%}"
  )


def build(setup: Setup) -> Study:
  """Table 1 for the network of the command line."""
  options = setup.options
  assert isinstance(options, Options)
  samples = tuple(sorted(set(options.samples or _SAMPLES[options.preset])))
  if samples[0] < 1:
    raise KwjaxError(f"--samples must be at least 1, found {samples[0]}")
  if not options.iq_weight > 0:
    raise KwjaxError(f"--iq-weight must be positive, found {options.iq_weight:g}")
  if options.preset == "cpu" and options.distill_steps is None:
    # IQ and Mix do not pay before some hundred steps.
    setup = setup._replace(chosen=dataclasses.replace(setup.chosen, distill_steps=_CPU_STEPS))
  source = options.source or (REAL if options.real_data else "bns")
  rules = quantization_rules(setup, options.bits, options.first_last)
  work = _Work(setup, setup.labelled(), source, options.iq_weight, options.iq_reduction, rules)
  is_published = setup.network.arch == "resnet44" and (options.bits, options.first_last) == ("2w4a", "4w4a")
  known = PAPER if is_published else {}
  table = Table(
    title=f"Table 1: {setup.network.name}, top-1 (%) at {rules.bits} distilled on {source} images, by images a class and loss",
    rows=tuple(map(str, samples)),
    columns=tuple(COLUMNS),
    paper={(str(n), column): known[column][n] for column in known for n in samples if n in known[column]},
    note="IQ: intermediate losses; Mix: mixup. The paper's network is another one (float 93.23), its KD 16,000 steps.",
  )
  configs = [setup.config(GAUSSIAN if source == REAL else source)]
  return Study(
    tables=(table,),
    plan=work.plan,
    protocol={
      "data used": (
        f"real images of {short_name(setup.real_data)}"
        if source == REAL and setup.real_data is not None
        else "none: images come from the network itself"
      ),
      "evaluation images": f"{len(work.evaluation)} of {short_name(work.evaluation)}; used for nothing else",
      "student": rules.describe(),
    },
    describe=work.describe,
    report=work.report,
    need=setup.need(configs, distills=True),
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(Options, args, "python -m experiments.knowledge_within.table1_ablation", __doc__)
  return run_command(lambda: run(options, name="table1_ablation", build=build, arch="resnet44"))


if __name__ == "__main__":
  sys.exit(main())
