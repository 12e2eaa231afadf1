"""Dead leaves for the rest of the library: where BNS images start from, and noise as a set to calibrate with.

    python -m weights_conversion --arch resnet44 --source resnet44.th --out networks/resnet44
    python -m experiments.noise.leaves_bns --network networks/resnet44 --eval-data cifar10.npz:test --real-data cifar10.npz:train

Beyond the papers. Two tables of BNS images (BatchNorm statistics, the project's settings) by starting point and number of
steps, each a run of its own whose learning rate has fallen to zero by then: J_KL of the images, the input counted as a layer, and
top-1 of a 4w4a student calibrated with them. A step costs the same whatever the start: `randn` N(0, 1) in pixel units, `uniform`
noise in [0, 1], or `dead_leaves`, the project's default.

A third table calibrates with other sources: real images (with --real-data), BNS images from dead leaves, these and as many
dead leaves together (`bns+dead_leaves`), and noise that nothing was optimized on. Ranges of noise are measured while the network
normalizes with its running statistics, or with those of the noise (`-current`). The student that is calibrated keeps its running
statistics all the same, because on real data they are right; what is borrowed is that behind a BatchNorm that is used to its
input, activations have the reach that they have on real data. The images are one batch then (large ones: batches of
--batch-size, whose statistics are pooled).

A fourth table fine-tunes a 2w4a student at equal cost, equally many steps: on the BNS images alone, and on these and as many dead
leaves.

* first and last layer 8 bit. At --preset cpu 128 images and up to 200 steps.

Ours, --preset cpu, ResNet-20, 1017 test images (standard error of a top-1 about 0.8), nine CPU minutes a seed. Seed 0: J_KL after
25, 50, 100, 200 steps .069, .0171, .0064, .0039 from randn, .090, .0206, .0066, .0036 from uniform, .047, .0121, .0053, .0040
from dead leaves: an advantage that 200 steps use up, and none for calibration, where 25 steps are as good as 200 (86.5 to 87.7,
without order). Sources, three seeds, 4w4a and 4w4a*: real 88.43 (.30) and 90.33 (.74), BNS 86.89 (.28) and 90.23 (.72), BNS with
dead leaves 85.32 (.79) and 90.04 (.44); Gaussian 83.71 (.74) and 88.86 (.06) running, 83.94 (.49) and 89.97 (.29) current;
dead leaves 84.63 (1.00) and 87.51 (.10) running, 87.18 (.64) and 89.71 (.41) current. ResNet-44: real 89.81 (.44) and
92.26 (.32), BNS 90.10 (.40) and 92.00 (.11), Gaussian 84.92 (.23) and 90.76 (.52) running, 87.25 (.49) and 92.07 (.28) current,
dead leaves 87.81 (.43) and 89.84 (.45) running, 88.95 (.40) and 91.61 (.37) current. So noise calibrates better with current
statistics than with running ones; dead leaves then do so without one optimization step, as well as BNS images for ResNet-20 and
a point worse for ResNet-44 at 4w4a. As extra data dead leaves cost accuracy: at 4w4a, and at 2w4a after 120 steps, 69.62
against 76.79 with BNS images alone (ResNet-20, seed 0).
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

from experiments._harness import image_sets, study_report
from experiments._harness.accuracy import top1
from experiments._harness.image_sets import Source, identity, short_name, synthesized
from experiments._harness.study import Cell, CellPlan, Setup, Study, StudyOptions, run
from experiments._harness.tables import PERCENT, Results, Table
from experiments.knowledge_within.table5_sigma import similarity_of
from experiments.noise import leaves_tuning
from experiments.noise.inputs import LEAVES, NOISES, noise
from experiments.noise.leaves_tuning import BNS, MIXED
from kwjax.analysis import figures
from kwjax.analysis.panel_figures import Panel, image_panels
from kwjax.batchnorm import adjust_statistics, reference_moments
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.compression.images import make_images
from kwjax.compression.workspace import CALIBRATION_KEY, REAL, SYNTHESIS_KEY, Workspace, stream_key
from kwjax.errors import KwjaxError
from kwjax.quantization import QuantizedNetwork, QuantRules, RangeTable, observe_ranges
from kwjax.runtime import cost
from kwjax.runtime.reporting.report import Picture
from kwjax.synthesis import SynthesisConfig

STARTS = ("randn", "uniform", LEAVES)
RUNNING, CURRENT = "running", "current"
NOISE_ROWS = {f"{name}-{statistics}": (name, statistics) for name in NOISES for statistics in (RUNNING, CURRENT)}
SOURCES = (REAL, BNS, MIXED, *NOISE_ROWS)
BITS = {"4w4a": None, "4w4a*": "8w8a"}
_JKL, _ACCURACY, _SOURCES, _TUNED = "J_KL", "4w4a", "sources", "fine-tuned"
_LONGEST = {"cpu": 200, "paper": 1000, "smoke": 8}
_IMAGES = {"cpu": 128, "paper": 800, "smoke": 4}
_SHOWN = 6


def step_counts(longest: int) -> tuple[int, ...]:
  """An eighth, a quarter, a half and all of the steps, ascending."""
  return tuple(sorted({max(1, longest // part) for part in (8, 4, 2, 1)}))


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with."""

  setup: Setup
  longest: int
  kinds: Mapping[str, str]  # title of a table: what it shows

  @property
  def count(self) -> int:
    """Images of every source."""
    return self.setup.chosen.images

  def config(self, start: str, steps: int) -> SynthesisConfig:
    """Of BNS images from a starting point."""
    return self.setup.config(BNS).with_steps(steps).replace(init=start)

  def bns(self, start: str, steps: int) -> Source:
    """BNS images from a starting point."""
    return synthesized(self.setup.network, self.config(start, steps), self.count)

  def source(self, row: str) -> Source:
    """The images of a row of the third table."""
    if row == REAL:
      return self.setup.source(REAL, self.count)
    if row in NOISE_ROWS:
      return noise(self.setup.network, NOISE_ROWS[row][0], self.count)
    made = self.bns(LEAVES, self.longest)
    return made if row == BNS else _together(MIXED, made, noise(self.setup.network, LEAVES, self.count))

  def plan(self, table: Table, row: str, column: str) -> CellPlan:
    """How one cell is measured."""
    kind = self.kinds[table.title]
    if kind == _TUNED:
      return leaves_tuning.plan(self.setup, self.source(row), column)
    source = self.source(row) if kind == _SOURCES else self.bns(row, int(column))
    if kind == _JKL:
      words = f"{source.description} from {row}; clean, BatchNorm in evaluation mode, with the input"
      return CellPlan({"source": source.settings, "measure": _JKL}, words, similarity_of(source))
    rules = QuantRules.parse("4w4a", first_last=BITS[column] if kind == _SOURCES else BITS[_ACCURACY])
    statistics = NOISE_ROWS[row][1] if row in NOISE_ROWS else RUNNING
    evaluation, chosen = self.setup.labelled(), self.setup.chosen
    settings: dict[str, Any] = {
      "source": source.settings,
      "statistics": [statistics, self.batch_size] if statistics == CURRENT else statistics,
      "rules": rules.to_json(),
      "calibration": [chosen.calibration_steps, chosen.calibration_batch],
      "evaluation": identity(evaluation),
    }
    protocol = (
      f"{rules.describe()}; {source.description}, BatchNorm on {statistics} statistics while ranges are measured; top-1 on "
      f"{len(evaluation)} images of {short_name(evaluation)}"
    )

    def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
      return top1(workspace, self.calibrated(workspace, source, rules, statistics, seed), evaluation)

    return CellPlan(settings, protocol, compute)

  @property
  def batch_size(self) -> int:
    """Images that share the statistics of their batch: all, unless they are large."""
    return self.count if self.setup.network.image_shape[0] <= 64 else min(self.count, self.setup.chosen.batch_size)

  def calibrated(
    self, workspace: Workspace, source: Source, rules: QuantRules, statistics: str, seed: int
  ) -> QuantizedNetwork:
    """The quantized network, its ranges measured under either kind of statistics."""
    chosen = self.setup.chosen
    if statistics == RUNNING:
      images = source.images(workspace, seed)
      whole = dataclasses.replace(chosen, images=len(images))  # both halves of a mixture
      return image_sets.calibrated(workspace, source, rules, whole, seed, images=images)

    def compute() -> dict[str, Any]:
      workspace.stop_if_asked()
      images = source.images(workspace, seed)
      # In evaluation mode this student does to these images what the network itself does with the statistics of their batch.
      adjusted = adjust_statistics(workspace.network, images, batch_size=self.batch_size, devices=workspace.group)
      return observe_ranges(
        adjusted, images, batch_size=32, devices=workspace.group, should_stop=workspace.should_stop
      ).to_json()

    table = RangeTable.from_json(
      workspace.results.once(f"{source.stage('current_ranges', seed)}-{self.batch_size}", compute)
    )
    return image_sets.quantized(workspace.network, table, rules, chosen, key=stream_key(seed, CALIBRATION_KEY))

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    made = {
      (cell.row, int(cell.column), cell.seed) for cell in cells if self.kinds[cell.table.title] in (_JKL, _ACCURACY)
    }
    tuned = sum(self.kinds[c.table.title] == _TUNED and c.column == leaves_tuning.TUNED for c in cells)
    made |= {(LEAVES, self.longest, cell.seed) for cell in cells if cell.row in (BNS, MIXED)}
    labelled = len(self.setup.eval_data) if self.setup.eval_data else 0
    duplicates = self.config(LEAVES, self.longest).duplicates
    return f"images        {len(made)} sets of {self.count}, up to {self.longest} steps\n" + cost.estimate(
      self.setup.network,
      synthesized=sum(self.count * duplicates * steps for _, steps, _ in made),
      trained=tuned * self.setup.chosen.distill_steps * self.setup.chosen.distill_batch_size,
      evaluated=len(cells) * (self.count + labelled),
    )

  def report(self, workspace: Workspace, results: Mapping[str, Results]) -> Mapping[str, Any]:
    """The third table under the fixed key of all reports."""
    (table,) = (t for t in self.tables() if self.kinds[t.title] == _SOURCES)
    return {"calibrated": study_report.top1_results(table, results[table.title], {bits: bits for bits in BITS})}

  def tables(self) -> tuple[Table, ...]:
    """The four tables, empty."""
    steps = tuple(map(str, step_counts(self.longest)))
    shapes = {
      _JKL: (STARTS, steps, "nats"),
      _ACCURACY: (STARTS, steps, PERCENT),
      _SOURCES: (SOURCES, tuple(BITS), PERCENT),
    }
    notes = {
      _JKL: "Columns: optimization steps; 0 would be the training data itself.",
      _ACCURACY: "Columns: optimization steps of the images.",
      _SOURCES: "* first and last layer 8 bit. Current: ranges measured under the statistics of the noise itself.",
    }
    chosen = self.setup.chosen
    return tuple(
      leaves_tuning.table(title, chosen.distill_steps, chosen.distill_batch_size)
      if kind == _TUNED
      else Table(title, shapes[kind][0], shapes[kind][1], unit=shapes[kind][2], note=notes[kind])
      for title, kind in self.kinds.items()
    )

  def figures(
    self, workspace: Workspace, folder: pathlib.Path, tables: Sequence[Table], results: Mapping[str, Results]
  ) -> dict[str, Picture]:
    """J_KL while images are made, some of the images by start and steps, and bars of the accuracies."""
    first = results[tables[0].title]
    curves, panels = {}, []
    for start in STARTS:
      for steps in step_counts(self.longest):
        entry = first.get((start, str(steps)))
        if entry is None or not entry.records:
          continue
        seed = min(entry.records)
        images, jkl = self._made(workspace, start, steps, seed)
        panels.append(Panel(f"{start}, {steps} steps", images[:_SHOWN]))
        if steps == self.longest and jkl is not None:
          curves[start] = (np.arange(len(jkl)), jkl)
    pictures = {}
    if curves:
      path = figures.jkl_curve(curves, folder / "jkl.png")
      pictures["J_KL of the views while images are made"] = Picture(
        path, "One seed, the longest run. At step 0 the starting point, clamped to [0, 1]."
      )
    if panels:
      path = image_panels(panels, folder / "images.png", images_a_row=_SHOWN)
      pictures["BNS images by starting point and steps"] = Picture(path, "The first images of one seed.")
    return {**pictures, **study_report.draw_bars(workspace, folder, tables, results)}

  def _made(self, workspace: Workspace, start: str, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Images that lie in the run's folder, and the J_KL of their views by step, the mean over batches."""
    config = self.config(start, steps)
    stage = self.bns(start, steps).stage("synthesis", seed)
    found = make_images(workspace, config, stage, count=self.count, key=stream_key(seed, SYNTHESIS_KEY))
    return found.images, np.mean(found.history["jkl"], axis=0) if "jkl" in found.history else None


def _together(name: str, first: Source, second: Source) -> Source:
  """The images of both."""

  def images(workspace: Workspace, seed: int) -> np.ndarray:
    return np.concatenate([first.images(workspace, seed), second.images(workspace, seed)])

  settings = {"first": first.settings, "second": second.settings}
  return Source(name, settings, f"{first.description} and {second.description}", images)


def build(setup: Setup) -> Study:
  """The tables for the network of the command line."""
  reference_moments(setup.network)  # refuses a network without BatchNorm
  options = setup.options
  longest = _LONGEST[options.preset] if options.steps is None else options.steps
  if longest < 1:
    raise KwjaxError(f"--steps must be at least 1, found {longest}")
  count = (
    _IMAGES[options.preset] if options.images is None and setup.network.image_shape[0] <= 64 else setup.chosen.images
  )
  if count < 2 * setup.group.local.size:
    raise KwjaxError(f"--images must be at least {2 * setup.group.local.size}, two a device, found {count}")
  setup = setup._replace(chosen=dataclasses.replace(setup.chosen, images=count))
  name = setup.network.name
  kinds = {
    f"{name}: J_KL of BNS images by starting point and steps": _JKL,
    f"{name}: top-1 (%) at 4w4a calibrated with these images": _ACCURACY,
    f"{name}: top-1 (%) calibrated with {count} images of each source": _SOURCES,
    f"{name}: top-1 (%) at {leaves_tuning.BITS}, dead leaves as extra data of the fine-tuning": _TUNED,
  }
  work = _Work(setup, longest, kinds)
  return Study(
    tables=work.tables(),
    plan=work.plan,
    protocol={"data used": "rows other than real: none; images come from the network itself, or are noise"},
    describe=work.describe,
    report=work.report,
    figures=work.figures,
    need=setup.need([work.config(start, longest) for start in STARTS], distills=True),
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(StudyOptions, args, "python -m experiments.noise.leaves_bns", __doc__)
  return run_command(lambda: run(options, name="leaves_bns", build=build, arch="resnet44"))


if __name__ == "__main__":
  sys.exit(main())
