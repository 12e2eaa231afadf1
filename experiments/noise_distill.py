"""A student from pure noise: noise-engineered distillation, Raikwar & Mishra (2022), tables 1 to 3 in small.

    python -m weights_conversion --arch resnet20 --source resnet20.th --out networks/resnet20
    python -m experiments.noise_distill --network networks/resnet20 --student resnet8 --eval-data cifar10.npz:test

No image is optimized: the teacher answers noise, and a student of any architecture learns its answers from scratch. Rows: the
noise, Gaussian pixels N(0, 1) in the teacher's normalized input space, or dead leaves. Columns: the share P of the teacher's
BatchNorm layers, drawn at random, that keep their running statistics; the others use the statistics of the batch, without
which noise is so far from what the layers know that the answers mean nothing. --running-fractions chooses the columns.

A cell is the top-1 of the student after its running statistics were made anew from the evaluation images, without their labels
(`kwjax.adjust_statistics`; published: the statistics of each test batch). The report also has its top-1 with the statistics
that it learned from noise, under `own`. The published students: ResNet-34 into ResNet-18, 200 epochs of 196 steps of 256, Adam
0.001; Gaussian with running statistics 13.49, with current ones 85.98, dead leaves with current ones 89.4; the teacher
93.29. --preset cpu is a thousandth of that work: an ordering, no accuracy to be compared.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.launch import relaunch_with_huge_pages

if __name__ == "__main__":
  relaunch_with_huge_pages()

import numpy as np
import tyro

from experiments import cost, stages
from experiments.common import run_command, say
from experiments.sources import identity, short_name
from experiments.stages import DISTILL_KEY, GAUSSIAN_KEY, Site
from experiments.study import Cell, CellPlan, Setup, Study, StudyOptions, run
from experiments.tables import Table
from experiments.train_options import architecture
from kwjax.batchnorm import adjust_statistics, current_layers
from kwjax.distillation import DistillConfig, distill
from kwjax.errors import KwjaxError
from kwjax.models import get_model
from kwjax.network import Network, fingerprint
from kwjax.runtime.data import ImageData
from kwjax.synthesis import dead_leaves, gaussian_images
from kwjax.training import initial_variables

NOISES = ("gaussian", "dead_leaves")
_POOL = {"cpu": 8192, "paper": 50_176, "smoke": 32}
_STEPS = {"cpu": 600, "paper": 39_200, "smoke": 3}
_BATCH = {"cpu": 128, "paper": 256, "smoke": 8}
_PUBLISHED = {("gaussian", 1.0): 13.49, ("gaussian", 0.0): 85.98, ("dead_leaves", 0.0): 89.4}
_WEIGHTS_KEY, _LAYERS_KEY = 101, 102


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
  """Options of the distillation from noise."""

  student: str = "resnet8"
  """Architecture of the student: a known one, or resnetN of CIFAR with N = 6n + 2."""
  running_fractions: tuple[float, ...] = (1.0, 0.0)
  """Shares P of the teacher's BatchNorm layers that keep their running statistics, the columns."""
  pool: int | None = None
  """Noise images, seen again every epoch. Default: by --preset."""
  shapes: str = "mixed"
  """Shape of the dead leaves: mixed, circle, square, oriented_square, rectangle, triangle or quadrilateral."""


def _column(fraction: float) -> str:
  return f"P={fraction:g}"


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with."""

  setup: Setup
  options: Options
  evaluation: ImageData
  arch: str
  model_options: Mapping[str, Any]
  pool: int
  config: DistillConfig

  def student(self, seed: int) -> Network:
    """With random weights, on the teacher's inputs."""
    teacher = self.setup.network
    model_options = {"num_classes": teacher.num_classes, **self.model_options}
    module = get_model(self.arch, **model_options)
    variables = initial_variables(module, teacher.image_shape, key=stages.stream_key(seed, _WEIGHTS_KEY))
    return Network(
      module,
      variables,
      image_shape=teacher.image_shape,
      input_mean=teacher.input_mean,
      input_std=teacher.input_std,
      name=self.options.student,
      arch=self.arch,
      model_options=model_options,
    )

  def noise(self, name: str, site: Site, seed: int) -> np.ndarray:
    """The pool f32[n,h,w,c], or u8 for dead leaves, whose colours are in [0, 1]."""
    key, teacher = stages.stream_key(seed, GAUSSIAN_KEY), site.network
    if name == "gaussian":
      return np.asarray(gaussian_images(key, self.pool, teacher.image_shape, teacher.input_mean, teacher.input_std))
    devices, shapes = site.group.local.devices, self.options.shapes
    images = dead_leaves(key, self.pool, teacher.image_shape, shapes=shapes, devices=devices)
    return np.round(np.asarray(images) * 255.0).astype(np.uint8)

  def plan(self, table: Table, row: str, column: str) -> CellPlan:
    """How one cell is measured."""
    fraction, config = float(column.removeprefix("P=")), self.config
    settings = {
      "teacher": fingerprint(self.setup.network),
      "student": [self.arch, dict(self.model_options)],
      "noise": [row, self.pool, self.options.shapes if row == "dead_leaves" else ""],
      "running_fraction": fraction,
      "distillation": config.to_json(),
      "evaluation": identity(self.evaluation),
    }
    protocol = (
      f"{self.options.student} from scratch, {config.steps} steps of {config.batch_size} from {self.pool} {row} images, Adam "
      f"{config.learning_rate:g}; teacher: {fraction:.0%} of the BatchNorm layers on running statistics; top-1 on "
      f"{len(self.evaluation)} images of {short_name(self.evaluation)} with statistics of these images"
    )

    def compute(site: Site, seed: int) -> Mapping[str, Any]:
      layers = current_layers(site.network, fraction, stages.stream_key(seed, _LAYERS_KEY))
      site.shutdown_point()
      say(f"making {self.pool} {row} images")
      pool = self.noise(row, site, seed)
      student = distill(
        self.student(seed),
        site.network,
        pool,
        config.replace(current=layers, checkpoint_every=site.checkpoint_steps),
        key=stages.stream_key(seed, DISTILL_KEY),
        workdir=site.scratch,
        devices=site.group,
        progress=True,
      )
      own = stages.top1(site, student, self.evaluation)
      images = self.evaluation.read(np.arange(len(self.evaluation)))
      adjusted = adjust_statistics(student, images, batch_size=config.batch_size, devices=site.group)
      return {**stages.top1(site, adjusted, self.evaluation), "own": own["value"], "current": list(layers)}

    return CellPlan(settings, protocol, compute)

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    trained = len(cells) * self.config.steps * self.config.batch_size
    return f"noise         {self.pool} images; {len(cells)} students of {self.config.steps} steps\n" + cost.estimate(
      self.setup.network, synthesized=0, trained=trained, evaluated=2 * len(cells) * len(self.evaluation)
    )


def build(setup: Setup) -> Study:
  """The table for the teacher of the command line."""
  options = setup.options
  assert isinstance(options, Options)
  arch, model_options = architecture(options.student)
  pool = options.pool if options.pool is not None else _POOL[options.preset]
  if pool < 1:
    raise KwjaxError(f"--pool must be at least 1, found {pool}")
  if not options.running_fractions or any(not 0.0 <= p <= 1.0 for p in options.running_fractions):
    raise KwjaxError(f"--running-fractions takes shares in [0, 1], found {options.running_fractions}")
  steps, batch, rate = options.distill_steps, options.distill_batch_size, options.distill_learning_rate
  config = DistillConfig.preset(
    "noise",
    steps=_STEPS[options.preset] if steps is None else steps,
    batch_size=_BATCH[options.preset] if batch is None else batch,
    learning_rate=1e-3 if rate is None else rate,
  )
  work = _Work(setup, options, setup.labelled(), arch, model_options, pool, config)
  fractions = tuple(dict.fromkeys(options.running_fractions))
  table = Table(
    title=f"Distillation from noise: {setup.network.name} into {options.student}, top-1 (%) by noise and share P of BatchNorm "
    "layers on running statistics",
    rows=NOISES,
    columns=tuple(map(_column, fractions)),
    paper={(n, _column(p)): value for (n, p), value in _PUBLISHED.items() if p in fractions},
    note="Published: CIFAR-10, ResNet-34 (93.29) into ResNet-18, 39,200 steps of 256.",
  )
  return Study(
    tables=(table,),
    plan=work.plan,
    protocol={
      "data used": "none: noise; the evaluation images, without labels, give the student's running statistics",
      "evaluation images": f"{len(work.evaluation)} of {short_name(work.evaluation)}",
      "student": f"{options.student}, random weights",
    },
    describe=work.describe,
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = tyro.cli(Options, args=args, prog="python -m experiments.noise_distill", description=__doc__)
  return run_command(lambda: run(options, name="noise_distill", build=build, arch="resnet20"))


if __name__ == "__main__":
  sys.exit(main())
