"""Numbers of the paper that no kept report shows, for docs/results.md: networks, rows and columns that were not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from experiments._harness.quantization_table import ROWS, Published
from experiments._harness.results_store import Stored
from experiments._harness.tables import Table
from experiments.knowledge_within import table1_ablation, table2_cifar, table3_imagenet, table4_similarity


class Unmeasured(NamedTuple):
  """A table of the paper's numbers, without ours.

  Attributes:
    table: with nothing but `paper`.
    reason: why they were not measured.
    how: what its `--preset paper` needs beside network and data to measure them, as the end of a sentence.
  """

  table: Table
  reason: str
  how: str = ""


_NAMES = {
  "resnet44": "ResNet-44",
  "wrn28_10": "WRN-28-10",
  "resnet18": "ResNet-18",
  "mobilenet_v2": "MobileNetV2",
  "densenet121": "DenseNet-121",
}
_NO_ACCELERATOR = "16,000 steps of KD need an accelerator, and the larger sets all of CIFAR-10; neither was at hand"
_NO_WRN = "no public weights of this network were at hand, nor was CIFAR-100"
_NO_IMAGENET = "neither the weights nor ImageNet were at hand"
_NO_SETS = "these data sets were not at hand"


def unmeasured(study: str, reports: Iterable[Stored]) -> list[Unmeasured]:
  """The paper's numbers of a study, as far as they are known to us, that none of its reports shows.

  Args:
    study: its name.
    reports: what is kept of it.

  Returns:
    a table for each network, cut down to the rows and columns that hold such a number; none for most studies.
  """
  # The same cell with the same number: a report has the paper's of its own network alone.
  shown = {
    (_place(study, row, column), cell["paper"])
    for report in reports
    for table in report.content["tables"]
    for row, cells in table["cells"].items()
    for column, cell in cells.items()
  }
  found = []
  for known in _KNOWN.get(study, lambda: iter(()))():
    left = {cell: value for cell, value in known.table.paper.items() if (_place(study, *cell), value) not in shown}
    rows = tuple(row for row in known.table.rows if any(row == cell[0] for cell in left))
    columns = tuple(column for column in known.table.columns if any(column == cell[1] for cell in left))
    if left:
      found.append(known._replace(table=dataclasses.replace(known.table, rows=rows, columns=columns, paper=left)))
  return found


def _place(study: str, row: str, column: str) -> tuple[str, ...]:
  """What a cell of the study is known by: in Table 4 users name rows and columns."""
  return (table4_similarity.plain_name(row),) if study == "table4_similarity" else (row, column)


def _table1() -> Iterator[Unmeasured]:
  published = table1_ablation.PAPER
  samples = sorted({count for column in published.values() for count in column})
  table = Table(
    f"Table 1: ResNet-44 (float {table2_cifar.PAPER_FLOAT['resnet44']:g}), top-1 (%) at 2w4a by images a class and loss",
    rows=tuple(map(str, samples)),
    columns=tuple(published),
    paper={(str(count), column): value for column in published for count, value in published[column].items()},
    note="First and last layer 4 bit. IQ: intermediate losses; Mix: mixup.",
  )
  yield Unmeasured(table, _NO_ACCELERATOR)


def _table2() -> Iterator[Unmeasured]:
  for arch, columns in table2_cifar.PAPER.items():
    title = f"Table 2: {_NAMES[arch]}, top-1 (%) after calibration and after distillation (KD) by data source"
    note = f"{table2_cifar.LEGEND} {table2_cifar.about_paper(arch)}"
    table = _by_source(title, {**columns, **table2_cifar.PAPER_MORE_IMAGES[arch]}, note)
    reason = _NO_ACCELERATOR if arch == "resnet44" else _NO_WRN
    yield Unmeasured(table, reason, ", the larger sets with `--distill-images`")


def _table3() -> Iterator[Unmeasured]:
  for arch, columns in table3_imagenet.PAPER.items():
    title = f"Table 3: {_NAMES[arch]}, top-1 (%) after calibration and after distillation (KD) by data source"
    yield Unmeasured(
      _by_source(title, columns, f"{table3_imagenet.LEGEND} {table3_imagenet.about_paper(arch)}"), _NO_IMAGENET
    )


def _by_source(title: str, columns: Published, note: str) -> Table:
  cells = {
    (row, name): value
    for name, values in columns.items()
    for row, value in zip(ROWS, values, strict=True)
    if value is not None
  }
  return Table(title, ROWS, tuple(columns), paper=cells, note=note)


def _table4() -> Iterator[Unmeasured]:
  published, column = table4_similarity.PAPER, "J_KL (nats)"
  table = Table(
    "Table 4: J_KL of further data sets on a ResNet-44 trained on CIFAR-10",
    rows=tuple(published),
    columns=(column,),
    paper={(row, column): value for row, value in published.items()},
  )
  yield Unmeasured(table, _NO_SETS, " where `--data` names them")


_KNOWN: dict[str, Callable[[], Iterator[Unmeasured]]] = {
  "table1_ablation": _table1,
  "table2_cifar": _table2,
  "table3_imagenet": _table3,
  "table4_similarity": _table4,
}
