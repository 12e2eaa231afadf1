"""What noise does inside a trained network: Raikwar & Mishra (2022), the figures of activations by layer.

    python -m weights_conversion --arch resnet44 --source resnet44.th --out networks/resnet44
    python -m experiments.noise.activations --network networks/resnet44 --real-data cifar10.npz:train --preset cpu

Rows: images (Gaussian noise, N(0, 1) in the normalized input space; dead leaves; real ones, with --real-data), and the statistics
that all BatchNorm layers normalize with: `running`, those of the training, or `current`, those of the batch. Columns:

- J_KL: divergence of the layers' inputs from what their running statistics say, the mean over channels and layers.
- deep spread: standard deviation of the inputs over the running one, geometric mean over the channels of the last quarter of the
  BatchNorm layers. 1 is as in training; below, the activations have collapsed.
- dead: share of the inputs of convolutions and classifier that are zero in every pixel of every image: dead ReLUs.
- evenness: entropy of the mean soft prediction over that of the uniform distribution; 100 is even.
- top class: share of the images that are given the most frequent class; 10 is even for ten classes.

The published claim: with running statistics activations on noise collapse with depth and all images get the same few answers;
with those of the batch they stay like those on real images. `figures/running.png` and `current.png` show the distributions,
`depth.png` divergence and spread of every layer. What is measured are the inputs of the layers, before they normalize.

Ours, --preset cpu (384 images a row in batches of 128), seeds 0 and 1, a minute a seed on two shared cores. ResNet-44: J_KL
falls from .488 to .081 (Gaussian) and from .215 to .036 (dead leaves), real images being at .043; the share of the most
frequent class falls from 96 to 17 per cent and from 46 to 15; the deep spread rises from .65 to .83 and from .84 to .86.
ResNet-20: J_KL .368 to .091 and .215 to .040 (real .023), most frequent class 54 to 20 and 43 to 15. So the divergence stays
small through the depth, and the answers are even. The collapse is less plain than the divergence: no ReLU dies of noise (2 per
cent of the channels are dead whatever the images), the first layers are up to twice as wide as in training before the last ones
are half as wide, and with ResNet-20 and dead leaves the deep layers are nearer to 1 with running statistics (.93) than with
current ones (.85).
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

from experiments._harness.image_sets import Source
from experiments._harness.study import Cell, CellPlan, Setup, Study, StudyOptions, run
from experiments._harness.tables import PERCENT, Results, Table
from experiments.noise.inputs import NOISES, noise
from kwjax.analysis.activation_figures import DepthCurve, depth_curves, distribution_panels, some_layers
from kwjax.analysis.activations import bin_edges, observe_activations
from kwjax.analysis.bias import class_mass, evenness
from kwjax.batchnorm import reference_moments
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.compression.workspace import REAL, Workspace
from kwjax.errors import KwjaxError
from kwjax.runtime import cost
from kwjax.runtime.reporting.messages import log
from kwjax.runtime.reporting.report import Picture

RUNNING, CURRENT = "running", "current"
_PATTERNS = {RUNNING: (), CURRENT: (".*",)}
IMAGES = (REAL, *NOISES)
_COLOURS = {REAL: 2, NOISES[0]: 0, NOISES[1]: 1}
ROWS = {f"{images}-{statistics}": (images, statistics) for images in IMAGES for statistics in _PATTERNS}
JKL, SPREAD, DEAD, EVENNESS, TOP = "J_KL", "deep spread", "dead", "evenness", "top class"
UNITS = {JKL: "nats", SPREAD: "", DEAD: PERCENT, EVENNESS: PERCENT, TOP: PERCENT}


def facts(observed: Mapping[str, Any]) -> dict[str, float]:
  """The columns of a row, from what `_Work.observed` keeps."""
  spread = list(observed["spread"].values())
  deep = spread[-max(1, len(spread) // 4) :]
  return {
    JKL: float(np.mean(list(observed["divergence"].values()))),
    SPREAD: float(np.exp(np.mean(np.log(np.maximum(deep, 1e-30))))),
    DEAD: observed["dead"],
    EVENNESS: min(1.0, evenness(observed["soft"])),
    TOP: float(np.max(observed["hard"])),
  }


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with."""

  setup: Setup

  def source(self, images: str) -> Source:
    """The images of a row."""
    count = self.setup.chosen.images
    return self.setup.source(REAL, count) if images == REAL else noise(self.setup.network, images, count)

  def observed(self, workspace: Workspace, row: str, seed: int) -> Mapping[str, Any]:
    """Histograms, divergence and spread by layer, dead channels and mean predictions of a row; measured once."""
    images, statistics = ROWS[row]
    source, size = self.source(images), self.setup.chosen.batch_size

    def compute() -> dict[str, Any]:
      workspace.stop_if_asked()
      found = observe_activations(
        workspace.network,
        source.images(workspace, seed),
        current=_PATTERNS[statistics],
        batch_size=size,
        devices=workspace.group,
        should_stop=workspace.should_stop,
      )
      mass = class_mass(found.logits)
      return {
        "counts": {layer: counts.tolist() for layer, counts in found.counts.items()},
        "divergence": found.divergence(),
        "spread": found.spread(),
        "dead": found.dead_share(),
        "soft": mass.soft.tolist(),
        "hard": mass.hard.tolist(),
      }

    return workspace.results.once(f"{source.stage('activations', seed)}-{statistics}-{size}", compute)

  def plan(self, table: Table, row: str, column: str) -> CellPlan:
    """How one cell is measured."""
    images, statistics = ROWS[row]
    source, size = self.source(images), self.setup.chosen.batch_size
    settings = {"source": source.settings, "statistics": statistics, "batch": size, "measure": column}
    protocol = f"{column} of {source.description}, all BatchNorm layers on {statistics} statistics, batches of {size}"
    return CellPlan(settings, protocol, lambda workspace, seed: facts(self.observed(workspace, row, seed))[column])

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    looked_at = len({(cell.row, cell.seed) for cell in cells}) * self.setup.chosen.images
    return cost.estimate(self.setup.network, synthesized=0, trained=0, evaluated=looked_at)

  def measured(self, workspace: Workspace, results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """`{row: [what was observed, by seed]}` of the rows that have a cell."""
    seeds: dict[str, set[int]] = {}
    for (row, _), entry in results.items():
      seeds.setdefault(row, set()).update(entry.records)
    return {
      row: [self.observed(workspace, row, seed) for seed in sorted(found)] for row, found in seeds.items() if found
    }

  def report(self, workspace: Workspace, results: Mapping[str, Results]) -> Mapping[str, Any]:
    """Keys of report.json beside the table: the claim with its numbers, divergence and spread by layer."""
    (found,) = results.values()
    measured = self.measured(workspace, found)
    notes = claims({row: [facts(observed) for observed in seeds] for row, seeds in measured.items()})
    for sentence in notes:
      log(sentence)
    by_layer = {
      row: {name: _over_seeds(seeds, name) for name in ("divergence", "spread")} for row, seeds in measured.items()
    }
    return {"by_layer": by_layer, "notes": notes}

  def figures(
    self, workspace: Workspace, folder: pathlib.Path, tables: Sequence[Table], results: Mapping[str, Results]
  ) -> dict[str, Picture]:
    """The distributions of some layers for either kind of statistics, and divergence and spread of all layers."""
    measured = self.measured(workspace, results[tables[0].title])
    if not measured:
      return {}
    pictures = {}
    panels = {
      label: {
        row: DepthCurve(list(_over_seeds(seeds, name).values()), _COLOURS[ROWS[row][0]], dashed=ROWS[row][1] == RUNNING)
        for row, seeds in measured.items()
      }
      for name, label in (("divergence", "KL (nats)"), ("spread", "standard deviation over the running one"))
    }
    pictures["Divergence and spread of every layer's input"] = Picture(
      depth_curves(panels, folder / "depth.png"),
      "Left: how far the inputs are from what the running statistics say, 0 being the data of the training. Right: below 1 the "
      "activations vary less than in training.",
    )
    for statistics in _PATTERNS:
      rows = [row for row in measured if ROWS[row][1] == statistics and ROWS[row][0] != REAL]
      if not rows:
        continue
      real = f"{REAL}-{RUNNING}"
      shown = {real: measured[real]} if real in measured else {}
      shown |= {row: measured[row] for row in rows}
      counts = {
        layer: {row: np.sum([observed["counts"][layer] for observed in seeds], axis=0) for row, seeds in shown.items()}
        for layer in some_layers(list(measured[rows[0]][0]["counts"]))
      }
      path = distribution_panels(
        counts,
        bin_edges(),
        folder / f"{statistics}.png",
        filled=real if real in measured else None,
        xlabel="input of the layer, running standard deviations from the running mean",
      )
      pictures[f"Inputs of BatchNorm layers, which normalize with {statistics} statistics"] = Picture(
        path, "In the order of execution, first to last. Grey: real images in evaluation mode."
      )
    return pictures


def claims(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
  """The published claim for each noise, in the means over seeds: `{row: [facts by seed]}` -> sentences."""
  sentences = []
  for images in NOISES:
    running, current = (found.get(f"{images}-{statistics}") for statistics in (RUNNING, CURRENT))
    if not running or not current:
      continue
    before, after = ({name: float(np.mean([f[name] for f in seeds])) for name in UNITS} for seeds in (running, current))
    holds = after[JKL] < before[JKL] and after[EVENNESS] > before[EVENNESS]
    sentences.append(
      f"{images}: that current statistics bring the activations nearer to those of the training, and the answers nearer to "
      f"even, {'holds' if holds else 'does not hold'}: J_KL {before[JKL]:.3g} running, {after[JKL]:.3g} current; spread of the "
      f"deep layers {before[SPREAD]:.2f} and {after[SPREAD]:.2f}; evenness of the answers {before[EVENNESS]:.0%} and "
      f"{after[EVENNESS]:.0%}; most frequent class {before[TOP]:.0%} and {after[TOP]:.0%}"
    )
  return sentences


def _over_seeds(seeds: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
  """Mean over seeds of a number by layer."""
  return {layer: float(np.mean([observed[name][layer] for observed in seeds])) for layer in seeds[0][name]}


def build(setup: Setup) -> Study:
  """The table for the network of the command line."""
  reference_moments(setup.network)  # refuses a network without BatchNorm
  if setup.chosen.batch_size < 2 * setup.group.local.size:
    raise KwjaxError(
      f"--batch-size must be at least {2 * setup.group.local.size}, two images a device, found {setup.chosen.batch_size}"
    )
  table = Table(
    title=f"Activations of {setup.network.name} on noise, by the statistics of its BatchNorm layers",
    rows=tuple(ROWS),
    columns=tuple(UNITS),
    unit=UNITS,
    note="Deep spread: standard deviation over the running one, last quarter of the layers; 1 is as in training.",
  )
  work = _Work(setup)
  return Study(
    tables=(table,),
    plan=work.plan,
    protocol={"data used": "rows other than real: none, images are noise"},
    describe=work.describe,
    report=work.report,
    figures=work.figures,
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(StudyOptions, args, "python -m experiments.noise.activations", __doc__)
  return run_command(lambda: run(options, name="noise_activations", build=build, arch="resnet44"))


if __name__ == "__main__":
  sys.exit(main())
