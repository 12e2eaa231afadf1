"""Sensitivity to the smoothing kernel, Table 5 of Haroush et al. (2020): schemes I and BNS+I, whose objectives hold the prior.

    python -m weights_conversion --arch resnet20 --source resnet20.th --out networks/resnet20
    python -m experiments.knowledge_within.table5_sigma --network networks/resnet20 --eval-data cifar10.npz:test --preset cpu

Rows: the Gaussian kernels that the paper names, side x side pixels with standard deviation s (5x5-s1 and 5x5-s.375 are its
two settings, 3x3-s1 is that of its Figure 2, 9x9-s.7 that of its Figure 5), and `none`: the same objective without
the prior. Columns, for each scheme: J_KL of the images (the input counted as a layer), their smoothness (mean squared
difference to their blur by one and the same kernel, 5x5 of s 1, whatever they were optimized with: small is smooth), and
top-1 at 4w4a* (first and last layer 8 bit) calibrated on them. The paper's numbers of this table are not known to us.

Ours, by that command, ResNet-20 (float 91.64 on 1017 CIFAR-10 test images), seed 0, about 12 minutes on two cores (AMD EPYC);
standard error of one top-1 about a point:

                 inception                       bns+inception
                 J_KL    smoothness  4w4a*       J_KL     smoothness  4w4a*
    none         .462    .101        84.76       .0049    .0109       90.27
    3x3-s1       .490    .00013      89.18       .0087    .0035       90.36
    5x5-s1       .650    .00007      87.91       .0096    .0030       90.46
    5x5-s.375    .205    .0061       87.32       .0049    .0098       90.07
    9x9-s.7      .469    .00014      89.68       .0077    .0039       89.77

The prior is worth at least 2.5 points under I, and nothing that shows under BNS+I, whose statistics leave little to it.

The schemes' other settings are the preset's. At `--preset cpu` 128 images of 120 steps a kernel, a scheme and a seed;
`--dry-run` says how long that takes. `figures/images.png` shows some images of each kernel.
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

import jax
import numpy as np

from experiments._harness import image_sets
from experiments._harness.accuracy import top1
from experiments._harness.distilled import float_score
from experiments._harness.image_sets import Source, identity, short_name
from experiments._harness.study import Cell, CellPlan, Setup, Study, StudyOptions, run
from experiments._harness.tables import PERCENT, Results, Table
from kwjax.analysis import figures
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.compression.images import similarity
from kwjax.compression.workspace import Workspace
from kwjax.errors import KwjaxError
from kwjax.quantization import QuantRules
from kwjax.runtime import cost
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.forwarding import forward_rows
from kwjax.synthesis.objective import smoothness_prior

SCHEMES = ("inception", "bns+inception")
# Row: side in pixels, standard deviation in pixels; None leaves the prior out.
KERNELS: dict[str, tuple[int, float] | None] = {
  "none": None,
  "3x3-s1": (3, 1.0),
  "5x5-s1": (5, 1.0),
  "5x5-s.375": (5, 0.375),
  "9x9-s.7": (9, 0.7),
}
_JKL, _SMOOTHNESS, _ACCURACY = "J_KL", "smoothness", "4w4a*"
_UNITS = {_JKL: "nats", _SMOOTHNESS: "", _ACCURACY: PERCENT}
_SHOWN = 6
# One batch of a CIFAR network; ten sets of images then take about a quarter of an hour on two cores.
_CPU_IMAGES = 128


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with."""

  setup: Setup

  def source(self, row: str, scheme: str) -> Source:
    """Images of a scheme under one kernel."""
    config, kernel = self.setup.config(scheme), KERNELS[row]
    if kernel is None:
      objective = dataclasses.replace(config.objective, smoothness=0.0)
    else:
      weight = config.objective.smoothness or 1.0  # ImageNet's published bns+inception has no prior
      objective = dataclasses.replace(
        config.objective, smoothness=weight, smoothness_size=kernel[0], smoothness_sigma=kernel[1]
      )
    return image_sets.synthesized(self.setup.network, config.replace(objective=objective), self.setup.chosen.images)

  def plan(self, table: Table, row: str, column: str) -> CellPlan:
    """How one cell is measured."""
    scheme, measure = split(column)
    source, chosen = self.source(row, scheme), self.setup.chosen
    settings: dict[str, Any] = {"source": source.settings, "measure": measure}
    if measure == _JKL:
      return CellPlan(
        settings, f"{source.description}; clean, BatchNorm in evaluation mode, with the input", similarity_of(source)
      )
    if measure == _SMOOTHNESS:
      return CellPlan(settings, f"{source.description}; against their blur by 5x5 of s 1", smoothness_of(source))
    evaluation, rules = self.setup.labelled(), QuantRules.parse("4w4a", first_last="8w8a")
    settings |= {
      "rules": rules.to_json(),
      "calibration": [chosen.images, chosen.calibration_steps, chosen.calibration_batch],
      "evaluation": identity(evaluation),
    }
    protocol = (
      f"{rules.describe()}; {source.description}; top-1 on {len(evaluation)} images of {short_name(evaluation)}"
    )

    def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
      return top1(workspace, image_sets.calibrated(workspace, source, rules, chosen, seed), evaluation)

    return CellPlan(settings, protocol, compute)

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    made = {(cell.row, split(cell.column)[0], cell.seed) for cell in cells}
    configs = [self.setup.config(scheme) for _, scheme, _ in made]
    count = self.setup.chosen.images
    labelled = len(self.setup.eval_data) if self.setup.eval_data else 0
    return (
      f"images        {len(made)} sets of {count}, {max((c.steps for c in configs), default=0)} steps a batch\n"
      + cost.estimate(
        self.setup.network,
        synthesized=sum(count * config.duplicates * config.steps for config in configs),
        trained=0,
        evaluated=len(made) * (2 * count + labelled),
      )
    )

  def figures(
    self, workspace: Workspace, folder: pathlib.Path, tables: Sequence[Table], results: Mapping[str, Results]
  ) -> dict[str, pathlib.Path]:
    """A row of images for each kernel and scheme that was measured, of the first of its seeds."""
    found = results[tables[0].title]
    shown, names = [], []
    for scheme in SCHEMES:
      for row in tables[0].rows:
        entry = found.get((row, f"{scheme}-{_SMOOTHNESS}"))
        if entry and entry.records:
          images = self.source(row, scheme).images(workspace, min(entry.records))
          shown.append(images[np.arange(_SHOWN) % len(images)])
          names += [f"{scheme}, {row}"] + [""] * (_SHOWN - 1)
    if not shown:
      return {}
    grid = figures.image_grid(np.concatenate(shown), folder / "images.png", titles=names, columns=_SHOWN)
    return {"Images by smoothing kernel": grid}


def split(column: str) -> tuple[str, str]:
  """Scheme and measure of a column."""
  scheme, measure = column.rsplit("-", 1)
  return scheme, measure


def similarity_of(source: Source) -> Any:
  """How J_KL of a source's images is computed, as a cell's `compute`."""

  def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
    found = similarity(workspace, source.images(workspace, seed))
    if found is None:
      raise KwjaxError(f"network {workspace.network.name} has no BatchNorm, so there is no J_KL")
    return {"value": found["jkl"], "without_input": found["without_input"]}

  return compute


def smoothness_of(source: Source) -> Any:
  """How the smoothness of a source's images is computed, as a cell's `compute`."""

  def compute(workspace: Workspace, seed: int) -> float:
    # In batches: the blur holds several copies of what it is given.
    rows = forward_rows(
      _smoothness, None, source.images(workspace, seed), batch_size=256, description="smoothness", devices=1
    )
    return float(processes.gather(np.concatenate(list(rows))).mean(dtype=np.float64))

  return compute


def _smoothness(_: None, images: jax.Array) -> jax.Array:
  """Smoothness f32[b] of every image alone."""
  return jax.vmap(lambda image: smoothness_prior(image[None]))(images)


def _float(workspace: Workspace, setup: Setup) -> Mapping[str, Any] | None:
  return None if setup.eval_data is None or setup.eval_data.labels is None else float_score(workspace, setup.eval_data)


def build(setup: Setup) -> Study:
  """Table 5 for the network of the command line."""
  columns = tuple(f"{scheme}-{measure}" for scheme in SCHEMES for measure in _UNITS)
  table = Table(
    title=f"Table 5: {setup.network.name}, sensitivity to the smoothing kernel",
    rows=tuple(KERNELS),
    columns=columns,
    unit={column: _UNITS[split(column)[1]] for column in columns},
    note="J_KL and smoothness: lower is closer to the training data, and smoother. * first and last layer 8 bit.",
  )
  if setup.options.preset == "cpu" and setup.options.images is None:
    fewer = dataclasses.replace(setup.chosen, images=min(setup.chosen.images, _CPU_IMAGES))
    setup = setup._replace(chosen=fewer)
  work = _Work(setup)
  return Study(
    tables=(table,),
    plan=work.plan,
    protocol={"data used": "none: images come from the network itself"},
    describe=work.describe,
    report=lambda workspace, results: {"float": _float(workspace, setup)},
    figures=work.figures,
    need=setup.need([setup.config(scheme) for scheme in SCHEMES], distills=False),
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(StudyOptions, args, "python -m experiments.knowledge_within.table5_sigma", __doc__)
  return run_command(lambda: run(options, name="table5_sigma", build=build, arch="resnet44"))


if __name__ == "__main__":
  sys.exit(main())
