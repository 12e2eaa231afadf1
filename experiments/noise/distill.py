"""A student from pure noise: noise-engineered distillation, Raikwar & Mishra (2022), tables 1 to 3 in small.

    python -m weights_conversion --arch resnet20 --source resnet20.th --out networks/resnet20
    python -m experiments.noise.distill --network networks/resnet20 --student resnet8 --eval-data cifar10.npz:test

No image is optimized: the teacher answers noise, and a student of any architecture learns its answers from scratch. Rows: the
noise, Gaussian pixels N(0, 1) in the teacher's normalized input space (--gaussian-space pixel: N(1/2, 1/4^2), clipped to
[0, 1]), or dead leaves. Columns of the first table: the share P of the teacher's BatchNorm layers, drawn at random, that keep
their running statistics; the others use the statistics of the batch, without which noise is so far from what the layers know
that the answers mean nothing. --running-fractions chooses the columns; three and more are also a curve. Columns of the second
table, measured only where --columns names them: the batch size B at P=0, with as many images in all as in the first table,
so the fewer steps the larger the batch.

    python -m experiments.noise.distill ... --rows dead_leaves --columns B=32 B=128 B=512

A cell is the top-1 of the student by --evaluation: after its running statistics were made anew from the evaluation images,
without their labels (adjusted: `kwjax.adjust_statistics`), with the statistics of each batch of evaluation images (current:
what was published), or with what it learned from noise (own). All three are in the report and cost one student.

Published: ResNet-34 into ResNet-18, 200 epochs of 196 steps of 256, noise drawn anew at every step (--fresh), Adam 0.001, a
tenth of it when the loss has not fallen for 10 epochs (--schedule plateau); Gaussian with running statistics 13.49, with
current ones 85.98, dead leaves with current ones 89.4; the teacher 93.29. The published scheduler looked at the labelled test
loss; here it sees the loss of the distillation. --preset cpu is a thousandth of that work, from a pool of noise images
that is seen several times (a step with noise of its own takes longer), with Adam 0.01 under a cosine, because a plateau needs
longer runs: an ordering, no accuracy to be compared.

Ours, ResNet-20 (float 91.64) into ResNet-8, by `--student resnet8 --distill-steps 800 --temperature 4` on 1017 CIFAR-10 test
images, seed 0, standard error of one top-1 1.4, nine students in 20 minutes on two cores (AMD EPYC with AVX-512): Gaussian 13.2
at P=1 and 18.3 at P=0; dead leaves 21.6, 27.0, 30.0, 31.0 and 29.7 at P=1, .75, .5, .25 and 0, and at P=0 30.5 with B=32,
28.3 with B=512.

With a GPU, as published: --preset paper --fresh --student resnet18_cifar.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments._harness.launch import relaunch_with_huge_pages

if __name__ == "__main__":
  relaunch_with_huge_pages()

from experiments._harness.image_sets import short_name
from experiments._harness.study import Cell, CellPlan, Setup, Study, StudyOptions, run
from experiments._harness.study_report import draw_bars
from experiments._harness.tables import Results, Table, over_seeds
from experiments._harness.train_options import architecture
from experiments.noise.published import BATCH_SIZES, BY_BATCH, BY_SHARE
from experiments.noise.student import DEAD_LEAVES, NOISES, Evaluation, Recipe, Space
from kwjax.analysis.curves import CurvePanel, curve_panels
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.cli.options import ByPreset
from kwjax.compression.workspace import Workspace
from kwjax.distillation import DistillConfig
from kwjax.errors import KwjaxError
from kwjax.network import fingerprint
from kwjax.runtime import cost
from kwjax.runtime.data import ImageData
from kwjax.runtime.reporting.report import Picture

_POOL = {"cpu": 8192, "paper": 50_176, "smoke": 32}
_STEPS = {"cpu": 600, "paper": 39_200, "smoke": 3}
_BATCH = {"cpu": 128, "paper": 256, "smoke": 8}
# The published 0.001 of Adam is for long runs: 600 steps from dead leaves with P=0, ResNet-20 into ResNet-8, ended at 15.8 %
# with it and at 25.5 % with 0.01 (one seed).
_ADAM = {"cpu": 1e-2, "paper": 1e-3, "smoke": 1e-2}
_SGD = 0.1
_EPOCH = 50_176  # images: the published 196 steps of 256, over which the loss is averaged


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
  """Options of the distillation from noise."""

  student: str = "resnet8"
  """Architecture of the student: a known one, or resnetN of CIFAR with N = 6n + 2."""
  running_fractions: tuple[float, ...] = (1.0, 0.0)
  """Shares P of the teacher's BatchNorm layers that keep their running statistics, the columns."""
  fresh: bool = False
  """Draw the noise of every step anew, as published, instead of making a pool before the first one."""
  pool: ByPreset = None
  """Noise images, seen again every epoch; without --fresh."""
  shapes: str = "mixed"
  """Shape of the dead leaves: mixed, circle, square, oriented_square, rectangle, triangle or quadrilateral."""
  gaussian_space: Space = "normalized"
  """normalized: N(0, 1) in the teacher's input space, not clipped, as published. pixel: N(1/2, 1/4^2) clipped to [0, 1]."""
  optimizer: Literal["adam", "sgd"] = "adam"
  """Adam, as published, or SGD with momentum 0.9. --distill-learning-rate is by default 0.1 for SGD, and for Adam 0.001 under
  --preset paper, else 0.01."""
  temperature: float = 1.0
  """T of the softened probabilities that the student learns; 1, as published, are the teacher's own."""
  schedule: Literal["cosine", "constant", "plateau"] | None = None
  """Learning rate: a cosine to zero, constant, or a tenth of it whenever the loss of the distillation has stopped falling.
  Default: plateau under --preset paper, else cosine."""
  plateau_steps: ByPreset = None
  """Steps whose mean loss the plateau looks at. Default: the published epoch of 50,176 images."""
  plateau_patience: int = 10
  """How many such means in a row may bring no new lowest one before the next cuts the learning rate."""
  evaluation: Evaluation = "adjusted"
  """Statistics that the student is evaluated with: made anew from the evaluation images, of each of their batches, or its
  own."""


def share_column(fraction: float) -> str:
  """Column of a share of layers on running statistics."""
  return f"P={fraction:g}"


def batch_column(batch: int) -> str:
  """Column of a batch size."""
  return f"B={batch}"


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with."""

  options: Options
  setup: Setup
  teacher: str
  evaluation: ImageData
  arch: str
  model_options: Mapping[str, Any]
  pool: int | None
  config: DistillConfig

  def recipe(self, row: str, column: str) -> Recipe:
    """The student of a cell."""
    name, value = column.split("=")
    options, config = self.options, self.config
    if name == "B":
      ratio, batch = config.batch_size / int(value), int(value)
      steps, averaged = (max(1, round(ratio * count)) for count in (config.steps, config.plateau_steps))
      config = config.replace(batch_size=batch, steps=steps, plateau_steps=averaged)
    return Recipe(
      self.teacher,
      options.student,
      self.arch,
      self.model_options,
      row,
      options.shapes,
      options.gaussian_space,
      self.pool,
      float(value) if name == "P" else 0.0,
      config,
      self.evaluation,
      options.evaluation,
    )

  def plan(self, table: Table, row: str, column: str) -> CellPlan:
    """How one cell is measured."""
    recipe = self.recipe(row, column)
    return CellPlan(recipe.settings, recipe.description, recipe.measure)

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    configs = [self.recipe(cell.row, cell.column).config for cell in cells]
    source = "drawn anew at every step" if self.pool is None else f"{self.pool} images"
    lengths = ", ".join(map(str, sorted({config.steps for config in configs})))
    return f"noise         {source}; {len(cells)} students of {lengths} steps\n" + cost.estimate(
      self.setup.network,
      synthesized=0,
      trained=sum(config.steps * config.batch_size for config in configs),
      evaluated=3 * len(cells) * len(self.evaluation),
    )


def draw(
  workspace: Workspace, folder: pathlib.Path, tables: Sequence[Table], results: Mapping[str, Results]
) -> Mapping[str, pathlib.Path | Picture]:
  """Bars of each table, and a curve of a noise over its columns where at least three of them were measured."""
  pictures: dict[str, pathlib.Path | Picture] = dict(draw_bars(workspace, folder, tables, results))
  xlabels = ("share P of the teacher's BatchNorm layers on running statistics", "batch size B")
  for table, xlabel, log in zip(tables, xlabels, ("", "x")):
    curves = {row: points for row in table.rows if len(points := _points(table, results[table.title], row)) >= 3}
    if curves:
      panel = CurvePanel(
        xlabel,
        "top-1 (%)",
        {row: ([x for x, _, _ in points], [y for _, y, _ in points]) for row, points in curves.items()},
        log=log,
        points={row: [f"{y:.1f}" for _, y, _ in points] for row, points in curves.items()},
        spread={row: [std for _, _, std in points] for row, points in curves.items()},
      )
      drawn = curve_panels([panel], folder / f"curve-{xlabel.split()[0]}.png")
      pictures[f"Top-1 by {xlabel}"] = Picture(drawn, "Means over seeds; bars are one standard deviation up and down.")
  return pictures


def _points(table: Table, results: Results, row: str) -> list[tuple[float, float, float]]:
  """(value of the column, mean in percent, standard deviation) of what was measured of a row, ascending."""
  found = [(float(column.split("=")[1]), over_seeds(results.get((row, column)))) for column in table.columns]
  points = [(x, 100 * s.mean, 100 * (s.std or 0.0)) for x, s in found if s is not None and s.mean is not None]
  return sorted(points)


def distillation(options: Options) -> DistillConfig:
  """Settings of the distillation for one command line, at the batch size of the first table.

  Raises:
    KwjaxError: a number is out of range.
  """
  steps, batch, rate = options.distill_steps, options.distill_batch_size, options.distill_learning_rate
  batch = _BATCH[options.preset] if batch is None else batch
  averaged = options.plateau_steps
  return DistillConfig.preset(
    "noise",
    steps=_STEPS[options.preset] if steps is None else steps,
    batch_size=batch,
    algorithm=options.optimizer,
    learning_rate=(_ADAM[options.preset] if options.optimizer == "adam" else _SGD) if rate is None else rate,
    temperature=options.temperature,
    schedule=options.schedule or ("plateau" if options.preset == "paper" else "cosine"),
    plateau_steps=max(1, round(_EPOCH / max(batch, 1))) if averaged is None else averaged,
    plateau_patience=options.plateau_patience,
  )


def tables_of(options: Options, teacher: str) -> tuple[Table, Table]:
  """By share of layers on running statistics, and by batch size."""
  fractions = tuple(dict.fromkeys(options.running_fractions))
  known = BY_SHARE.get(options.student, {})
  return (
    Table(
      title=f"Distillation from noise: {teacher} into {options.student}, top-1 (%) by noise and share P of BatchNorm "
      "layers on running statistics",
      rows=NOISES,
      columns=tuple(map(share_column, fractions)),
      paper={(n, share_column(p)): value for (n, p), value in known.items() if p in fractions},
      note="Published, CIFAR-10, 39,200 steps of 256, ResNet-34 (93.29) into ResNet-18: Gaussian 13.49 at P=1 and 85.98 at P=0; "
      "18.26, 57.73, 79.54, 82.24 and 89.4 at P=.9, .75, .5, .25 and 0, said to be of Gaussian noise, but the last is the number "
      "of dead leaves. Other students, P=0: WRN-28-10 88.12 Gaussian and 90.75 dead leaves, MobileNetV2 82.47 and 86.94.",
    ),
    Table(
      title=f"Distillation from noise: {teacher} into {options.student}, top-1 (%) by noise and batch size B, P=0",
      rows=NOISES,
      columns=tuple(map(batch_column, BATCH_SIZES)),
      paper={(DEAD_LEAVES, batch_column(b)): value for b, value in BY_BATCH.get(options.student, {}).items()},
      optional=tuple(map(batch_column, BATCH_SIZES)),
      note="Equally many images in all in every column. Published, dead leaves, ResNet-34 into ResNet-18, B=32 to 512: 88.09, "
      "88.21, 89.35, 89.40, 89.19.",
    ),
  )


def build(setup: Setup) -> Study:
  """The tables for the teacher of the command line."""
  options = setup.options
  assert isinstance(options, Options)
  arch, model_options = architecture(options.student)
  pool = options.pool if options.pool is not None else _POOL[options.preset]
  if pool < 1:
    raise KwjaxError(f"--pool must be at least 1, found {pool}")
  if options.fresh and options.pool is not None:
    raise KwjaxError("--fresh draws the noise of every step anew: leave --pool out")
  if not options.running_fractions or any(not 0.0 <= p <= 1.0 for p in options.running_fractions):
    raise KwjaxError(f"--running-fractions takes shares in [0, 1], found {options.running_fractions}")
  evaluation = setup.labelled()
  work = _Work(
    options,
    setup,
    fingerprint(setup.network),
    evaluation,
    arch,
    model_options,
    None if options.fresh else pool,
    distillation(options),
  )
  return Study(
    tables=tables_of(options, setup.network.name),
    plan=work.plan,
    protocol={
      "data used": "none: noise; unless --evaluation is own, the evaluation images, without labels, give the student's "
      "BatchNorm statistics",
      "evaluation images": f"{len(evaluation)} of {short_name(evaluation)}",
      "student": f"{options.student}, random weights",
    },
    describe=work.describe,
    figures=draw,
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(Options, args, "python -m experiments.noise.distill", __doc__)
  return run_command(lambda: run(options, name="noise_distill", build=build, arch="resnet20"))


if __name__ == "__main__":
  sys.exit(main())
