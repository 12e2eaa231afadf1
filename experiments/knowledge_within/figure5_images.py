"""Figure 5 of Haroush et al. (2020): the images of each scheme side by side, with how close each set is to the training data.

    python -m weights_conversion --arch resnet20 --source resnet20.th --out networks/resnet20
    python -m experiments.knowledge_within.figure5_images --network networks/resnet20 --real-data cifar10.npz:train --images 128

A panel of `figures/images.png` for each row: images made from BatchNorm statistics (`bns`), by class (`inception`), by both
(`bns+inception`), Gaussian noise (`gaussian`, shown clipped), and real ones (`real`, left out without --real-data). Where
images have targets or labels a column shows one class, the same in every panel, at most ten classes spread over all of
them; otherwise the first images are shown as they come. --shown is the number of rows of images.

Columns of the table: J_KL of the whole set, the input counted as a layer, and the share of images that the network
takes for their target or label (`on-target`). The paper's figure was made with a smoothing kernel of 9x9 pixels and s .7
(`experiments.knowledge_within.table5_sigma` has that kernel); numbers of the paper for it are not known to us.

Ours, by that command, ResNet-20, 128 images of 120 steps, seed 0, nine minutes on two cores (AMD EPYC): J_KL .0271 real, .0048
BNS, .0096 BNS+I, .650 I, .348 G; all images of I and BNS+I are taken for their target. Real
images are farther away than BNS ones because they lack the augmentation of the training.

At `--preset cpu` 384 images of 120 steps a scheme; `--dry-run` says how long that takes. Other sizes: --images, --steps.
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

import numpy as np

from experiments._harness.image_sets import Source, drawn_indices
from experiments._harness.study import Cell, CellPlan, Setup, Study, StudyOptions, run
from experiments._harness.tables import PERCENT, Results, Table, number
from kwjax.analysis import panel_figures
from kwjax.analysis.panel_figures import Panel
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.compression.images import make_images, similarity
from kwjax.compression.workspace import GAUSSIAN, GAUSSIAN_KEY, REAL, REAL_KEY, SYNTHESIS_KEY, Workspace, stream_key
from kwjax.errors import KwjaxError
from kwjax.runtime import cost
from kwjax.runtime.devices import processes
from kwjax.runtime.evaluate import predict
from kwjax.synthesis import SynthesisConfig

ROWS = (REAL, "bns", "bns+inception", "inception", GAUSSIAN)
_JKL, _ON_TARGET = "J_KL", "on-target"
# Columns of a panel on small and on large images, which are shown in their own size.
_CLASSES = {True: 10, False: 5}
_NAMES = {
  REAL: "Real images",
  "bns": "BNS: BatchNorm statistics",
  "inception": "I: inception loss",
  "bns+inception": "BNS + I",
  GAUSSIAN: "G: Gaussian noise",
}


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
  """Options of Figure 5."""

  shown: int = 3
  """Images of each class that a panel shows."""


class Labelled(NamedTuple):
  """Images with the class that each was meant for."""

  images: np.ndarray
  labels: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with, and the panels filled."""

  setup: Setup
  shown: int

  def plan(self, table: Table, row: str, column: str) -> CellPlan | None:
    """How one cell is measured."""
    source = self.setup.source(row, self.setup.chosen.images)
    if column == _ON_TARGET and not self.has_classes(row):
      return None
    settings = {"source": source.settings, "measure": column}
    if column == _JKL:
      return CellPlan(
        settings, f"{source.description}; clean, BatchNorm in evaluation mode, with the input", self._jkl(source)
      )

    def on_target(workspace: Workspace, seed: int) -> Mapping[str, Any]:
      found = self.labelled(workspace, source, seed)
      assert found.labels is not None
      workspace.stop_if_asked()
      logits = predict(
        workspace.network, found.images, batch_size=32, devices=workspace.group, should_stop=workspace.should_stop
      )
      hits = processes.gather(logits).argmax(axis=1) == found.labels
      return {"value": float(hits.mean()), "count": len(hits)}

    return CellPlan(settings, f"{source.description}; share that the network takes for their class", on_target)

  def has_classes(self, row: str) -> bool:
    """Whether each image of a row was meant for a class."""
    if row == REAL:
      return self.setup.real_data is not None and self.setup.real_data.labels is not None
    return has_targets(self.setup.config(row))

  def labelled(self, workspace: Workspace, source: Source, seed: int) -> Labelled:
    """The images of a source, made or read, with their classes where they have some."""
    if source.name == REAL:
      data = self.setup.real_data
      assert data is not None
      chosen = drawn_indices(data, self.setup.chosen.images, stream_key(seed, REAL_KEY))
      return Labelled(data.read(chosen), None if data.labels is None else data.labels[chosen])
    config = self.setup.config(source.name)
    key = stream_key(seed, SYNTHESIS_KEY if config.is_optimized else GAUSSIAN_KEY)
    count = self.setup.chosen.images
    made = make_images(workspace, config, source.stage("synthesis", seed), count=count, key=key)
    return Labelled(np.asarray(made.images), np.asarray(made.labels) if has_targets(config) else None)

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    made = {(cell.row, cell.seed) for cell in cells}
    configs = [config for row, _ in made if row != REAL and (config := self.setup.config(row)).is_optimized]
    count = self.setup.chosen.images
    return (
      f"images        {len(configs)} sets of {count}, {max((c.steps for c in configs), default=0)} steps a batch\n"
      + cost.estimate(
        self.setup.network,
        synthesized=sum(count * config.duplicates * config.steps for config in configs),
        trained=0,
        evaluated=len(cells) * count,
      )
    )

  def figures(
    self, workspace: Workspace, folder: pathlib.Path, tables: Sequence[Table], results: Mapping[str, Results]
  ) -> dict[str, pathlib.Path]:
    """A panel for each row that was measured, of the first of its seeds."""
    found, sets = results[tables[0].title], {}
    for row in tables[0].rows:
      entry = found.get((row, _JKL)) or found.get((row, _ON_TARGET))
      if entry and entry.records:
        seed = min(entry.records)
        sets[row] = self.labelled(workspace, self.setup.source(row, self.setup.chosen.images), seed), seed
    if not sets:
      return {}
    columns = _CLASSES[self.setup.network.image_shape[0] <= 64]
    chosen = shared_classes([made.labels for made, _ in sets.values() if made.labels is not None], columns)
    rows = rows_of([made for made, _ in sets.values()], chosen, self.shown)
    panels = []
    for row, (made, seed) in sets.items():
      shown = chosen_images(made, chosen, rows, columns)
      is_by_class = made.labels is not None and len(chosen) > 0
      names = [f"class {label}" for label in chosen] if is_by_class else []
      panels.append(Panel(_NAMES[row], made.images[shown], _caption(found, row, seed, len(made.images)), names))
    across = min(columns, len(chosen) or columns)
    path = panel_figures.image_panels(
      panels, folder / "images.png", images_a_row=across, panels_a_row=2 if columns == _CLASSES[True] else 1
    )
    return {"Images by scheme": path}

  def _jkl(self, source: Source) -> Any:
    def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
      found = similarity(workspace, self.labelled(workspace, source, seed).images)
      if found is None:
        raise KwjaxError(f"network {workspace.network.name} has no BatchNorm, so there is no J_KL")
      return {"value": found["jkl"], "without_input": found["without_input"], "per_layer": found["per_layer"]}

    return compute


def has_targets(config: SynthesisConfig) -> bool:
  """Whether a scheme optimizes images towards classes."""
  return config.is_optimized and config.objective.inception + config.objective.cross_entropy > 0


def shared_classes(labels: Sequence[np.ndarray], count: int) -> np.ndarray:
  """At most `count` classes that occur in all of some sets, spread over those that do; i[m], ascending."""
  if not labels:
    return np.zeros(0, int)
  common = sorted(set.intersection(*(set(found.tolist()) for found in labels)))
  return np.asarray(common, int)[
    np.unique(np.linspace(0, len(common) - 1, min(count, len(common))).round().astype(int))
  ]


def rows_of(sets: Sequence[Labelled], classes: np.ndarray, shown: int) -> int:
  """Rows of images, at most `shown`, that every set with labels can fill with all of these classes."""
  counts = [int(np.sum(made.labels == label)) for made in sets if made.labels is not None for label in classes]
  return min([shown, *counts])


def chosen_images(made: Labelled, classes: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """Indices of the images of a panel, row by row: a class a column where images have classes, else those that come first.

  Args:
    made: the images.
    classes: the classes of the columns; none where no class is common to all sets.
    rows: rows, for which each class has enough images.
    columns: images a row where there are no classes.
  """
  if made.labels is None or not len(classes):
    return np.arange(min(rows * (len(classes) or columns), len(made.images)))
  members = [np.flatnonzero(made.labels == label) for label in classes]
  return np.asarray([index[row] for row in range(rows) for index in members])


def _caption(found: Results, row: str, seed: int, count: int) -> str:
  """J_KL and share on target, as far as measured."""
  words = [f"{count} images"]
  for column, text in ((_JKL, "J_KL {} nats"), (_ON_TARGET, "{} % on target")):
    entry = found.get((row, column))
    value = entry.records.get(seed, {}).get("value") if entry else None
    if value is not None:
      words.append(text.format(number(value, PERCENT if column == _ON_TARGET else "nats")))
  return ", ".join(words)


def build(setup: Setup) -> Study:
  """Figure 5 for the network of the command line."""
  options = setup.options
  assert isinstance(options, Options)
  if options.shown < 1:
    raise KwjaxError(f"--shown must be at least 1, found {options.shown}")
  table = Table(
    title=f"Figure 5: {setup.network.name}, images by scheme",
    rows=ROWS,
    columns=(_JKL, _ON_TARGET),
    unit={_JKL: "nats", _ON_TARGET: PERCENT},
    note="J_KL with the input as a layer: lower is closer to the training data.",
  )
  work = _Work(setup, options.shown)
  made = [row for row in options.rows or ROWS if row != REAL]
  return Study(
    tables=(table,),
    plan=work.plan,
    protocol={"data used": "rows other than real: none, images come from the network itself"},
    describe=work.describe,
    figures=work.figures,
    need=setup.need([setup.config(row) for row in made] or [setup.config(GAUSSIAN)], distills=False),
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(Options, args, "python -m experiments.knowledge_within.figure5_images", __doc__)
  return run_command(lambda: run(options, name="figure5_images", build=build, arch="resnet44"))


if __name__ == "__main__":
  sys.exit(main())
