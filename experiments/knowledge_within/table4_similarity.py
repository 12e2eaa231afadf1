"""Table 4 and Table 7 of Haroush et al. (2020): J_KL of data sets on networks trained on each, and what it detects.

    python -m experiments.knowledge_within.table4_similarity \
        --networks cifar10=networks/resnet44 fashion=networks/resnet8_fashion \
        --train-data cifar10=cifar10.npz:train fashion=/usr/share/datasets/fashion-mnist:train \
        --data cifar10=cifar10.npz:test cifar100=tfds:cifar100:test mnist=tfds:mnist:test \
          fashion=/usr/share/datasets/fashion-mnist:test svhn=tfds:svhn_cropped:test stl10=tfds:stl10:test

Each NAME=FOLDER of --networks says which set of --data is the network's own; all others are foreign to it. Sets that you do
not have are left out. Images of other sizes are fitted as `kwjax.load_data` does: 28x28 gets a black border to 32x32, grey
becomes RGB. Always there: `random` (uniform pixels in [0, 1]), `gaussian` (N(0, 1) in the network's normalized space) and
`fgsm` (the network's own --data moved by 0.1 in normalized space along the sign of the gradient of its labels' loss, not
clipped). Columns are networks, written ARCH@OWN.

- J_KL of a whole set: BatchNorm in evaluation mode, mean over the BatchNorm layers (without the input, which the records
  give as `with_input`) of the mean over channels; the records keep every layer. Row `train`: the network's own --train-data.
- The same divided by that of `train`.
- Detection (for each network; beyond the paper): area under the ROC curve, own --data against each other set. `divergence`:
  `kwjax.divergence_scores` of single images; `fitted`: its distance from how --train-data diverge; `fitted-bns`: from how
  images diverge that were made out of the network (no data at all; measured when it is named, or at --preset paper);
  `J_KL-16`: J_KL of disjoint random groups of 16 images; `max-softmax`: the usual score. 50 % is chance.

The paper's J_KL (its Table 7), ResNet-44 trained on CIFAR-10: CIFAR-10 .023, CIFAR-100 .022, MNIST .151, SVHN .182, STL-10
.031, random .498, FGSM .075; its normalized ones and those of its other networks are not known to us. A ResNet-44 with public
weights has, by an independent implementation in PyTorch, .0419 (5085 training images), .0439 (1017 test images),
Fashion-MNIST .118, MNIST .182, random .497, gaussian .491, FGSM .083.

Ours, the same ResNet-44 and a ResNet-8 of three epochs on Fashion-MNIST, 2000 images of a set (1017 of CIFAR-10:test), seed 0:

               J_KL                     over train          AUROC by ResNet-44 (ResNet-8), own test images against them
               ResNet-44   ResNet-8                         fitted         divergence     max-softmax
    train      .0420       .00080       1      1                           50.4 (49.4)    43.9 (50.3)
    CIFAR-10   .0439       .611         1.04   761          - (99.4)       - (96.5)       - (75.8)
    Fashion    .117        .00073       2.79   .91          99.8 (-)       86.5 (-)       94.4 (-)
    MNIST      .181        .105         4.31   131          100.0 (86.8)   87.5 (81.5)    91.4 (44.3)
    random     .498        1.18         11.8   1470         100.0 (99.6)   100.0 (99.6)   90.7 (72.6)
    gaussian   .490        .600         11.7   748          100.0 (96.4)   100.0 (98.7)   90.3 (90.6)
    FGSM       .0857       .0283        2.04   35.3         81.5 (66.2)    56.0 (53.1)    76.1 (59.6)

Groups of 16 are told apart by J_KL at 99.9 and more, FGSM too. That took 6 minutes on two shared cores (AMD EPYC). Nearly all of
the ResNet-44's J_KL of its own data is the augmentation it was trained with, which plain images lack; its ratios therefore say
less.

--preset cpu takes at most 2000 images of a set, drawn at random; smoke 32; paper all of them. --images says otherwise.
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

from experiments._harness.study import Cell, CellPlan, Setup, Study, run
from experiments._harness.tables import PERCENT, Results, Table, over_seeds
from experiments.knowledge_within.detection import detection_cell
from experiments.knowledge_within.similarity_options import Options, pairs, subjects
from experiments.knowledge_within.similarity_sets import (
  FGSM,
  FITTED_BNS,
  GAUSSIAN,
  RANDOM,
  SCORES,
  TRAIN,
  Subject,
)
from kwjax.analysis import comparison_figures
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.compression.workspace import Workspace
from kwjax.errors import KwjaxError
from kwjax.runtime import cost
from kwjax.runtime.devices import memory

_JKL, _RATIO = "Table 4: J_KL of data sets", "Table 7: J_KL of data sets over that of the training data"
PAPER = {TRAIN: 0.023, "cifar100": 0.022, "mnist": 0.151, "svhn": 0.182, "stl10": 0.031, RANDOM: 0.498, FGSM: 0.075}
"""The paper's J_KL of a ResNet-44 trained on CIFAR-10, by the names of sets in small letters and digits."""


@dataclasses.dataclass(frozen=True)
class _Work:
  """What the cells are measured with."""

  subjects: Mapping[str, Subject]
  detection: Mapping[str, str]  # title of a table: name of a network

  def plan(self, table: Table, row: str, column: str) -> CellPlan | None:
    """How one cell is measured."""
    if table.title in self.detection:
      return detection_cell(self.subjects[self.detection[table.title]], row, column)
    subject = self.subjects[column]
    names = (row,) if table.title == _JKL else (row, TRAIN)
    protocol = f"{subject.images(row).description}, BatchNorm in evaluation mode, without the input"

    def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
      found = subject.jkl(workspace, row, seed)
      if table.title == _JKL:
        return {**found, "count": subject.images(row).size}
      own = subject.jkl(workspace, TRAIN, seed)
      return {"value": found["value"] / own["value"], "train": own["value"]}

    if table.title == _RATIO:
      protocol += f"; over {subject.images(TRAIN).description}"
    seeded = any(subject.images(name).seeded for name in names)
    return CellPlan(subject.settings(*names), protocol, compute, seeded=seeded)

  def describe(self, cells: Sequence[Cell]) -> str:
    """What the cells cost, for --dry-run."""
    lines = []
    for name, subject in self.subjects.items():
      own = [c for c in cells if name == self.detection.get(c.table.title, c.column)]
      # A cell of its own forwards its images; the inside images and the references are forwarded once a score.
      evaluated = sum(subject.images(cell.row).size for cell in own if cell.table.title != _RATIO)
      is_made = any(cell.column == FITTED_BNS for cell in own)
      count, config = subject.made.settings["count"], subject.made.settings["config"]
      made = count * config["duplicates"] * config["steps"] if is_made else 0
      text = cost.estimate(subject.network, synthesized=made, trained=0, evaluated=evaluated)
      lines.append(f"{name}: {len(own)} cells\n{text}")
    return "\n".join(lines)

  def figures(
    self, workspace: Workspace, folder: pathlib.Path, tables: Sequence[Table], results: Mapping[str, Results]
  ) -> dict[str, pathlib.Path]:
    """Heat maps of J_KL, and the ROC curves of the first seed of each network."""
    drawn = {}
    for table, file in ((tables[0], "jkl.png"), (tables[1], "ratio.png")):
      values = [[_mean(results[table.title], row, column) for column in table.columns] for row in table.rows]
      if any(value is not None for row in values for value in row):
        label = "J_KL (nats)" if table.title == _JKL else "J_KL over that of the training data"
        drawn[table.title] = comparison_figures.heat_map(values, table.rows, table.columns, folder / file, label=label)
    for number, (title, name) in enumerate(self.detection.items()):
      subject = self.subjects[name]
      panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
      for (row, kind), entry in results[title].items():
        if entry.records:
          seed = min(entry.records)
          inside, outside = (subject.scores(workspace, kind, of, seed) for of in (subject.own, row))
          panels.setdefault(row, {})[kind] = inside, outside
      if panels:
        drawn[f"{title}, ROC curves"] = comparison_figures.roc_panels(panels, folder / f"roc-{number}.png")
    return drawn


def _mean(results: Results, row: str, column: str) -> float | None:
  found = over_seeds(results.get((row, column)))
  return found.mean if found else None


def build(setup: Setup) -> Study:
  """Table 4 for the networks of the command line."""
  options = setup.options
  assert isinstance(options, Options)
  found = {subject.name: subject for subject in subjects(options)}
  names = [name for name, _ in pairs("data", options.data)]
  rows = (TRAIN, *names, RANDOM, GAUSSIAN, FGSM)
  detection = {f"Detection by {name}: AUROC (%) of its own {s.own} against others": name for name, s in found.items()}
  note = "Beside the paper's numbers: its own networks, whose augmentation and sets of images are not those here."
  tables = (
    Table(_JKL, rows, tuple(found), paper=_published(found, rows), unit="nats", note=note),
    Table(_RATIO, rows, tuple(found), unit="", note="How many times farther away than the training data."),
    *(
      Table(
        title,
        tuple(row for row in rows if row != found[name].own),
        SCORES,
        unit=PERCENT,
        optional=() if options.preset == "paper" else (FITTED_BNS,),
        note="50 is chance; the records give 95 % intervals. Against train, 50 is what one wants.",
      )
      for title, name in detection.items()
    ),
  )
  work = _Work(found, detection)
  pixels = max(
    s.size * int(np.prod(subject.network.image_shape)) for subject in found.values() for s in subject.sets.values()
  )
  return Study(
    tables=tables,
    plan=work.plan,
    protocol={
      "networks": "; ".join(f"{name}, {subject.identity[:16]}" for name, subject in found.items()),
      "FGSM": "0.1 in normalized space, not clipped, on the network's own data",
    },
    describe=work.describe,
    figures=work.figures,
    # The images, the attacked ones, and a batch of each in between.
    need=memory.Need(device=0, host=3 * 4 * pixels),
  )


def plain_name(name: str) -> str:
  """A set's name as `PAPER` has it: stl10 for STL-10."""
  return "".join(letter for letter in name.lower() if letter.isalnum())


def _published(found: Mapping[str, Subject], rows: Sequence[str]) -> dict[tuple[str, str], float]:
  """The paper's J_KL in the column of a ResNet-44 trained on CIFAR-10."""
  plain = {row: plain_name(row) for row in rows}
  return {
    (row, name): PAPER[plain[row]]
    for name, subject in found.items()
    if subject.network.arch == "resnet44" and plain[subject.own] == "cifar10"
    for row in rows
    if plain[row] in PAPER
  }


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the study; returns the exit status."""
  options = parse(Options, args, "python -m experiments.knowledge_within.table4_similarity", __doc__)
  return run_command(lambda: _run(options))


def _run(options: Options) -> int:
  if not options.networks or options.network or options.arch or options.weights:
    raise KwjaxError(
      "this table takes its networks as --networks NAME=FOLDER, NAME one of --data; python -m weights_conversion and "
      "python -m experiments.train_reference write such folders"
    )
  if not options.data or options.eval_data or options.real_data:
    raise KwjaxError("this table takes its images as --data NAME=SPEC and --train-data NAME=SPEC")
  if options.images is not None and options.images < 1:
    raise KwjaxError(f"--images must be at least 1, found {options.images}")
  first = pathlib.Path(pairs("networks", options.networks)[0][1])
  return run(dataclasses.replace(options, network=first), name="table4_similarity", build=build, arch="resnet44")


if __name__ == "__main__":
  sys.exit(main())
