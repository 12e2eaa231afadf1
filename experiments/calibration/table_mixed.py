"""Bits by layer against equal bits everywhere, at equal size: what `kwjax.allocate_bits` is worth.

    python -m weights_conversion --arch resnet44 --source resnet44.th --out networks/resnet44
    python -m experiments.calibration.table_mixed --network networks/resnet44 --eval-data cifar10.npz:test --images 128

Rows: mean bits of the weights, over all weights, and of the activations, over all values that layers read; a copy of a row is as
large as the one with that many bits everywhere. Columns: `equal`, the same bits in every layer; `by layer`, the bits that
`allocate_bits` chooses by the sensitivity of each layer, measured on images made from BatchNorm statistics. Both are calibrated
on these images in the main job's way (`--calibration best`), in the columns `..., paper` in the paper's. Two tables: top-1, and
KL(float || quantized). No real image is used but for the evaluation.

Ours, by that command, ResNet-44 (float 93.41 on 1017 CIFAR-10 test images), seed 0, four minutes on two cores (AMD EPYC with
AVX-512); standard error of one top-1 about 0.9 points:

              equal    by layer   equal, paper   by layer, paper      KL: equal   by layer
    3w3a      80.92    88.00      66.76          87.41                .777        .346
    3.5w3.5a           91.15                     90.56                            .101
    4w4a      92.04    91.84      88.50          92.13                .145        .043
    5w5a      91.94    92.92      91.84          92.82                .053        .012
    6w6a      92.92    92.82      93.02          93.22                .016        .004

No published numbers; the idea is that of ZeroQ (Cai et al. 2020, 3.2) and HAWQ-V3 (Yao et al. 2021).
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments._harness.launch import relaunch_with_huge_pages

if __name__ == "__main__":
  relaunch_with_huge_pages()

from experiments._harness.distilled import float_score
from experiments._harness.image_sets import Source, digest, identity, short_name
from experiments._harness.study import Cell, CellPlan, Setup, Study, StudyOptions, run
from experiments._harness.tables import Results, Table, over_seeds
from experiments.calibration.scored import NO_PART, scored, with_draws
from kwjax.analysis.allocation_figures import bits_by_layer, size_curves
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.compression.student import calibrated
from kwjax.compression.workspace import CALIBRATION_KEY, Workspace, stream_key
from kwjax.errors import KwjaxError, RuleError
from kwjax.intercept import matmul_layers
from kwjax.quantization import Allocation, QuantRules, Sensitivity, allocate_from, measure_sensitivity
from kwjax.quantization.allocate import CANDIDATES, Budget
from kwjax.quantization.methods import BEST, PAPER, Method
from kwjax.runtime import cost
from kwjax.runtime.data import ImageData
from kwjax.runtime.reporting.messages import log
from kwjax.runtime.reporting.report import Picture

EQUAL, BY_LAYER = "equal", "by layer"
_PAPERS = ", paper"
COLUMNS = (EQUAL, BY_LAYER, EQUAL + _PAPERS, BY_LAYER + _PAPERS)
_BUDGETS = {"cpu": ("3w3a", "3.5w3.5a", "4w4a", "5w5a", "6w6a"), "paper": ("3w3a", "4w4a", "5w5a"), "smoke": ("4w4a",)}
_NATS = "nats"


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
  """Options of this study."""

  budgets: tuple[str, ...] = ()
  """Mean bits, the rows, such as 4w4a or 3.5w4a. Default: by --preset."""
  sensitivity_images: int = 32
  """How many of the images the sensitivities are measured on."""


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with; `logits` keeps the float network's, made once."""

  setup: Setup
  options: Options
  evaluation: ImageData
  logits: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def source(self) -> Source:
    """Images that sensitivities are measured on and students are calibrated with."""
    return self.setup.source("bns", self.setup.chosen.images)

  def sensitivity(self, workspace: Workspace, seed: int) -> dict[str, Sensitivity]:
    """Of every layer, measured once for all budgets, in the paper's calibration."""
    count = min(self.options.sensitivity_images, self.setup.chosen.images)

    def compute() -> list[Any]:
      log(f"measuring the sensitivity of every layer on {count} images")
      key = stream_key(seed, CALIBRATION_KEY)
      images, base = self.source.images(workspace, seed)[:count], QuantRules.parse("8w8a")
      size = 32 if workspace.network.image_shape[0] <= 64 else 8
      found = measure_sensitivity(
        workspace.network, images, CANDIDATES, base, key=key, batch_size=size, progress=True, devices=1
      )
      return [[name, *entry] for name, entry in found.items()]

    stored = workspace.results.once(f"{self.source.stage('sensitivity', seed)}-{count}", compute)
    as_bits = lambda table: {int(bits): float(loss) for bits, loss in table.items()}
    return {name: Sensitivity(as_bits(weights), as_bits(inputs), *sizes) for name, weights, inputs, *sizes in stored}

  def allocation(self, workspace: Workspace, budget: str, seed: int) -> Allocation:
    """Bits of every layer under a budget."""
    return allocate_from(
      workspace.network, self.sensitivity(workspace, seed), budget=budget, rules=QuantRules.parse("8w8a")
    )

  def plan(self, table: Table, row: str, column: str) -> CellPlan | None:
    """How one cell is measured; equal bits are whole ones."""
    method = PAPER if column.endswith(_PAPERS) else BEST
    is_equal, source = column.startswith(EQUAL), self.source
    if is_equal and "." in row:
      return None
    chosen, value = self.setup.chosen, "kl" if table.unit_of(column) == _NATS else "top1"
    settings = {
      "source": source.settings,
      "budget": row,
      "equal": is_equal,
      "method": {name: value for name, value in method._asdict().items() if name not in NO_PART},
      "sensitivity": 0 if is_equal else self.options.sensitivity_images,
      "calibration": [chosen.images, chosen.calibration_steps, chosen.calibration_batch],
      "evaluation": identity(self.evaluation),
    }
    how = f"{row} in every layer" if is_equal else f"{row} on average, by layer"
    protocol = (
      f"{how}, {method.applied(QuantRules.parse('8w8a')).describe().partition(', ')[2]}"
      f"{', ' + method.describe() if method.describe() else ''}; {source.description}; {len(self.evaluation)} images of "
      f"{short_name(self.evaluation)}"
    )

    def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
      found = workspace.results.once(
        f"copies/{digest([row, column, settings])}-seed{seed}",
        lambda: self._measure(workspace, row, is_equal, method, seed),
      )
      return {**found, "value": found[value], "count": len(self.evaluation)}

    return CellPlan(settings, protocol, compute)

  def _measure(self, workspace: Workspace, budget: str, is_equal: bool, method: Method, seed: int) -> dict[str, Any]:
    rules = QuantRules.parse(budget) if is_equal else self.allocation(workspace, budget, seed).rules
    images = self.source.images(workspace, seed)[: self.setup.chosen.images]
    student = calibrated(
      workspace,
      f"{self.source.stage('ranges', seed)}-{len(images)}",
      images,
      rules,
      with_draws(method, self.setup.chosen),
      key=stream_key(seed, CALIBRATION_KEY),
      description=self.source.name,
    )
    bits = {
      name: [rule.weight_bits, rule.activation_bits] for name, rule in student.rules.resolve(workspace.network).items()
    }
    return {**scored(workspace, student, self.evaluation, self.logits), "bits": bits}

  def figures(
    self, workspace: Workspace, folder: pathlib.Path, tables: Sequence[Table], results: Mapping[str, Results]
  ) -> dict[str, Picture]:
    """Top-1 by the size of the weights, and the bits of every layer under each budget."""
    found, pictures = results[tables[0].title], {}
    weights = sum(math.prod(layer.kernel_shape or ()) * layer.repeats for layer in matmul_layers(workspace.network))
    curves: dict[str, list[tuple[float, float | None]]] = {}
    for (row, column), entry in found.items():
      over, mean = over_seeds(entry), Budget.parse(row).weights
      if over is not None and over.mean is not None and mean is not None:
        curves.setdefault(column, []).append((weights * mean / 8000, 100.0 * over.mean))
      record = entry.records.get(0) or next(iter(entry.records.values()), None)
      if column == BY_LAYER and record is not None:
        bits = {name: (ends[0], ends[1]) for name, ends in record["bits"].items()}
        path = bits_by_layer(bits, folder / f"bits-{row}.png")
        pictures[f"Bits by layer, {row}"] = Picture(
          path, f"Bits that layers get when {row} is the mean, in execution order."
        )
    if curves:
      path = size_curves(curves, folder / "size.png", label="top-1 (%)")
      pictures = {
        "Accuracy by size": Picture(path, "Size: all kernels at their bits, without scales; 1000 bytes."),
        **pictures,
      }
    return pictures

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    chosen, config = self.setup.chosen, self.setup.config("bns")
    students = len({(cell.row, cell.column, cell.seed) for cell in cells})
    layers, seeds = len(matmul_layers(self.setup.network)), len({cell.seed for cell in cells})
    tried = seeds * layers * 2 * len(CANDIDATES) * self.options.sensitivity_images
    return f"images        {seeds} sets of {chosen.images}, {config.steps} steps a batch\n" + cost.estimate(
      self.setup.network,
      synthesized=seeds * chosen.images * config.duplicates * config.steps,
      trained=0,
      evaluated=tried + students * (len(self.evaluation) + 2 * chosen.images),
    )


def build(setup: Setup) -> Study:
  """The study for the network of the command line."""
  options, evaluation = setup.options, setup.labelled()
  assert isinstance(options, Options)
  budgets = tuple(dict.fromkeys(options.budgets or _BUDGETS[options.preset]))
  for budget in budgets:
    if None in Budget.parse(budget)[:2]:
      raise RuleError(f"--budgets takes mean bits of both sides from 2 to 8, such as 4w4a or 3.5w4a, found {budget!r}")
  if options.sensitivity_images < 1:
    raise KwjaxError(f"--sensitivity-images must be at least 1, found {options.sensitivity_images}")
  work = _Work(setup, options, evaluation)
  note = "One row: one size. equal: the same bits in every layer; by layer: chosen by measured sensitivity."
  name = setup.network.name
  tables = (
    Table(f"Bits by layer, {name}: top-1 (%) by mean bits", budgets, COLUMNS, note=note),
    Table(
      f"Bits by layer, {name}: KL from the float network",
      budgets,
      COLUMNS,
      unit=dict.fromkeys(COLUMNS, _NATS),
      note=note,
    ),
  )
  return Study(
    tables=tables,
    plan=work.plan,
    protocol={
      "data used": "none: images come from the network itself",
      "evaluation images": f"{len(evaluation)} of {short_name(evaluation)}; used for nothing else",
      "sensitivity": f"KL(float || one layer quantized), {options.sensitivity_images} images, ranges of the paper's calibration",
    },
    describe=work.describe,
    report=lambda workspace, results: {"float": float_score(workspace, evaluation)},
    figures=work.figures,
    need=setup.need([setup.config("bns")], distills=False),
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(Options, args, "python -m experiments.calibration.table_mixed", __doc__)
  return run_command(
    lambda: run(options, name="table_mixed", build=build, arch="resnet44", default="efficientnet_lite0")
  )


if __name__ == "__main__":
  sys.exit(main())
