"""Figure 2 of Haroush et al. (2020): what one scheme's objective does to the quantity that the other one optimizes.

    python -m weights_conversion --arch resnet20 --source resnet20.th --out networks/resnet20
    python -m experiments.knowledge_within.figure2_monitor --network networks/resnet20 --preset cpu

The paper's two claims, which the report judges by the numbers of every seed:
- while scheme I (inception loss and smoothness prior) is optimized, J_KL, which is not in its loss, first falls and then
  diverges: the lowest J_KL lies after the first step, and the last one is above the first;
- while BNS is optimized, the images become smooth (mean squared difference to their blur by 3x3 of s 1, the kernel of the
  figure), although smoothness is not in its loss: the last value is below the first.
The figure's numbers are not known to us.

Both quantities are read at the start of a step, `0` being the starting point; J_KL is that of the augmented views of the batch,
the input counted as a layer. All settings are the published ones (starting from noise, I with its prior), in one batch; --preset
cpu has fewer images and steps: 128 images, 2 copies, 200 steps with the drop at 160. --preset paper: a batch of 800, 4 copies,
1000 steps.

Ours, by that command, ResNet-20 (float 91.64 on 1017 CIFAR-10 test images), seed 0, 15 minutes on two cores (AMD EPYC) shared
with other work: both claims hold. Under I J_KL falls from 0.266 to 0.237, in two steps only, swings (0.52 at step 6, 0.32 at
step 11), and ends at 1.72. Under BNS the smoothness falls from 0.115 to 0.017 (lowest 0.0169 at step 181).
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments._harness.launch import relaunch_with_huge_pages

if __name__ == "__main__":
  relaunch_with_huge_pages()

import numpy as np

from experiments._harness.image_sets import synthesized
from experiments._harness.study import Cell, CellPlan, Setup, Study, StudyOptions, run
from experiments._harness.tables import Results, Table
from kwjax.analysis.curves import CurvePanel, curve_panels
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.cli.options import config_of
from kwjax.compression.images import make_images
from kwjax.compression.workspace import SYNTHESIS_KEY, Workspace, stream_key
from kwjax.runtime import cost
from kwjax.runtime.reporting.messages import log
from kwjax.synthesis import SynthesisConfig

START, LOWEST, LOWEST_AT, LAST = "start", "lowest", "lowest at step", "last"
COLUMNS = (START, LOWEST, LOWEST_AT, LAST)
_CPU = {"images": 128, "steps": 200, "batch_size": 128, "duplicates": 2}


class Watch(NamedTuple):
  """A quantity that is watched while a scheme that does not optimize it runs.

  Attributes:
    name: of the quantity.
    term: its name in a synthesis's history.
    unit: of it.
    monitor: the objective's term that must be computed for it.
    optimized: a term of the scheme's own loss, drawn beside it.
    claim: what the paper says, in words.
    holds: `(curve f64[t]) -> whether it does so`.
  """

  name: str
  term: str
  unit: str
  monitor: str
  optimized: str
  claim: str
  holds: Callable[[np.ndarray], bool]


def falls_then_diverges(curve: np.ndarray) -> bool:
  """Whether a curve's minimum lies between its ends and its last value is above its first."""
  return bool(0 < np.argmin(curve) < len(curve) - 1 and curve[-1] > curve[0])


def falls(curve: np.ndarray) -> bool:
  """Whether a curve's last value is below its first."""
  return bool(curve[-1] < curve[0])


WATCHED: dict[str, Watch] = {
  "inception": Watch("J_KL", "jkl", "nats", "bns", "inception", "J_KL first falls, then diverges", falls_then_diverges),
  "bns": Watch("smoothness", "smoothness", "", "smoothness", "jkl", "the images become smoother", falls),
}


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with."""

  setup: Setup

  def config(self, scheme: str) -> SynthesisConfig:
    """Published settings, at the preset's size, with the other scheme's quantity watched."""
    options, chosen = self.setup.options, self.setup.chosen
    sized = {} if options.preset == "paper" else {name: getattr(chosen, name) for name in _CPU if name != "images"}
    job = dataclasses.replace(options.main_job(scheme), preset="paper", **sized)
    config = config_of(job, self.setup.network, chosen)
    changes: dict[str, Any] = {"monitor": (WATCHED[scheme].monitor,)}
    if scheme == "bns":
      changes |= {"smoothness_size": 3, "smoothness_sigma": 1.0}
    return config.replace(objective=dataclasses.replace(config.objective, **changes))

  def count(self, config: SynthesisConfig) -> int:
    """Images: one batch, unless --images says otherwise."""
    options = self.setup.options
    return config.batch_size if options.preset == "paper" and options.images is None else self.setup.chosen.images

  def history(self, workspace: Workspace, scheme: str, seed: int) -> dict[str, np.ndarray]:
    """`{term: f64[steps]}`, the mean over batches; made once."""
    config = self.config(scheme)
    count = self.count(config)
    source = synthesized(self.setup.network, config, count)

    def compute() -> dict[str, Any]:
      key = stream_key(seed, SYNTHESIS_KEY)
      found = make_images(workspace, config, source.stage("synthesis", seed), count=count, key=key).history
      return {name: values.astype(np.float64).mean(0).tolist() for name, values in found.items() if values.ndim == 2}

    curves = workspace.results.once(source.stage("history", seed), compute)
    return {name: np.asarray(values) for name, values in curves.items()}

  def plan(self, table: Table, row: str, column: str) -> CellPlan:
    """How one cell is measured."""
    config, watch = self.config(row), WATCHED[row]
    source = synthesized(self.setup.network, config, self.count(config))

    def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
      curve = self.history(workspace, row, seed)[watch.term]
      return {"value": facts(curve)[column], "holds": watch.holds(curve)}

    return CellPlan(
      {"source": source.settings, "measure": [watch.name, column]},
      f"{watch.name} while optimizing {source.description}, published settings, {config.duplicates} copies",
      compute,
    )

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    configs = [self.config(row) for row, _ in {(cell.row, cell.seed) for cell in cells}]
    return f"images        {len(configs)} sets, {max((c.steps for c in configs), default=0)} steps\n" + cost.estimate(
      self.setup.network,
      synthesized=sum(self.count(config) * config.duplicates * config.steps for config in configs),
      trained=0,
      evaluated=0,
    )

  def report(self, workspace: Workspace, results: Mapping[str, Results]) -> Mapping[str, Any]:
    """Keys of report.json beside the tables: each claim with its numbers and the curves."""
    claims, curves = [], {}
    for scheme, watch in WATCHED.items():
      for seed in measured_seeds(results, scheme):
        history = self.history(workspace, scheme, seed)
        curve = history[watch.term]
        claims.append(
          {
            "claim": f"while optimizing {scheme}, {watch.claim}",
            "seed": seed,
            "holds": watch.holds(curve),
            **facts(curve),
          }
        )
        curves[f"{scheme}, seed {seed}"] = {name: values.tolist() for name, values in history.items()}
    notes = [as_text(claim) for claim in claims]
    for sentence in notes:
      log(sentence)
    return {"claims": claims, "curves": curves, "notes": notes}

  def figures(
    self, workspace: Workspace, folder: pathlib.Path, tables: Sequence[Table], results: Mapping[str, Results]
  ) -> dict[str, pathlib.Path]:
    """For each scheme what is watched, beside what it optimizes."""
    pictures = {}
    for scheme, watch in WATCHED.items():
      found = {f"seed {seed}": self.history(workspace, scheme, seed) for seed in measured_seeds(results, scheme)}
      if not found:
        continue
      first = next(iter(found.values()))[watch.term]
      panels = []
      for term, marks in ((watch.term, {"lowest": float(facts(first)[LOWEST_AT])}), (watch.optimized, {})):
        curves = {name: (np.arange(len(history[term])), history[term]) for name, history in found.items()}
        panels.append(CurvePanel("step", _axis_name(term), curves, log="y", marks=marks))
      path = curve_panels(panels, folder / f"{scheme}.png")
      pictures[f"{watch.name} (left) while {scheme} is optimized; right: a term of its loss"] = path
    return pictures


def facts(curve: np.ndarray) -> dict[str, float]:
  """First, lowest and last value of a curve f64[t], and the step of the lowest."""
  lowest = int(np.argmin(curve))
  return {START: float(curve[0]), LOWEST: float(curve[lowest]), LOWEST_AT: float(lowest), LAST: float(curve[-1])}


def as_text(claim: Mapping[str, Any]) -> str:
  """A claim with its numbers, and whether it holds."""
  return (
    f"{claim['claim']} (seed {claim['seed']}): {'holds' if claim['holds'] else 'does not hold'}; {claim[START]:.4g} at the "
    f"start, lowest {claim[LOWEST]:.4g} at step {claim[LOWEST_AT]:.0f}, {claim[LAST]:.4g} at the last step"
  )


def measured_seeds(results: Mapping[str, Results], scheme: str) -> list[int]:
  """Seeds of which a cell of the scheme was measured, ascending."""
  return sorted(
    {seed for found in results.values() for (row, _), entry in found.items() if row == scheme for seed in entry.records}
  )


def _axis_name(term: str) -> str:
  return {"jkl": "J_KL (nats)", "smoothness": "smoothness (squared pixels of [0, 1])"}.get(term, f"{term} loss")


def build(setup: Setup) -> Study:
  """Figure 2 for the network of the command line."""
  options = setup.options
  if options.preset == "cpu":
    sized = {name: value for name, value in _CPU.items() if getattr(options, name) is None}
    setup = setup._replace(chosen=dataclasses.replace(setup.chosen, **sized))
  work = _Work(setup)
  tables = tuple(
    Table(
      title=f"Figure 2: {setup.network.name}, {watch.name} while optimizing {scheme}",
      rows=(scheme,),
      columns=COLUMNS,
      unit={column: "" if column == LOWEST_AT else watch.unit for column in COLUMNS},
      note=f"The paper's claim: {watch.claim}, though the loss of {scheme} does not hold {watch.name}.",
    )
    for scheme, watch in WATCHED.items()
  )
  return Study(
    tables=tables,
    plan=work.plan,
    protocol={"data used": "none: images come from the network itself"},
    describe=work.describe,
    report=work.report,
    figures=work.figures,
    need=setup.need([work.config(scheme) for scheme in WATCHED], distills=False),
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(StudyOptions, args, "python -m experiments.knowledge_within.figure2_monitor", __doc__)
  return run_command(lambda: run(options, name="figure2_monitor", build=build, arch="resnet44"))


if __name__ == "__main__":
  sys.exit(main())
