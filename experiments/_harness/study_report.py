"""What a study leaves behind: its tables as text, CSV, JSON and HTML, with figures."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments._harness.tables import PERCENT, Entry, Results, Table, as_json, as_rows, as_text, over_seeds, write_csv
from kwjax.analysis import figures
from kwjax.compression.workspace import Workspace
from kwjax.network import fingerprint
from kwjax.runtime.devices import processes
from kwjax.runtime.reporting.messages import log
from kwjax.runtime.reporting.report import Picture, command_line, versions, write_report

if TYPE_CHECKING:
  from experiments._harness.study import Study

Figures = Callable[
  [Workspace, pathlib.Path, Sequence[Table], Mapping[str, Results]], Mapping[str, pathlib.Path | Picture]
]
"""`(workspace, folder, tables, {table title: Results}) -> {title: PNG, or Picture with a caption}`."""


def finish(workspace: Workspace, study: Study, results: Mapping[str, Results], seeds: Sequence[int]) -> None:
  """Write report.json, report.html, tables.csv and figures of everything measured so far, and print the tables."""
  folder = workspace.folder
  extra = study.report(workspace, results)
  with tempfile.TemporaryDirectory() as elsewhere:
    # All processes draw, because reading images is something they do together; one keeps what it drew.
    place = folder / "figures" if processes.is_main() else pathlib.Path(elsewhere)
    pictures = study.figures(workspace, place, study.tables, results)
  if not processes.is_main():
    return
  filled = [(table, results[table.title]) for table in study.tables]
  write_csv(folder / "tables.csv", filled)
  report = {
    "network": workspace.network.name,
    "protocol": {
      "teacher": f"{workspace.network.name}, float32, {workspace.network.source.get('file', 'weights of unknown origin')}",
      "network fingerprint": fingerprint(workspace.network)[:16],
      **study.protocol,
    },
    "seed": list(seeds) if len(seeds) > 1 else seeds[0],
    **extra,
    "tables": [as_json(table, found) for table, found in filled],
    "versions": versions(),
    "command": command_line(),
  }
  page = write_report(
    report,
    folder,
    figures=pictures,
    tables={table.title: as_rows(table, found) for table, found in filled},
    title=study.tables[0].title,
  )
  for table, found in filled:
    print(f"\n{as_text(table, found)}", flush=True)
  log(f"\ndone: {page}, {folder / 'tables.csv'}")


def draw_bars(
  workspace: Workspace, folder: pathlib.Path, tables: Sequence[Table], results: Mapping[str, Results]
) -> dict[str, Picture]:
  """Bars of every table whose columns are all accuracies, with one standard deviation, as far as measured."""
  pictures = {}
  for number, table in enumerate(tables):
    if any(table.unit_of(column) != PERCENT for column in table.columns):
      continue
    found = results[table.title]
    bars = {column: {row: _bar(found.get((row, column))) for row in table.rows} for column in table.columns}
    measured = {column: row for column, row in bars.items() if any(bar is not None for bar in row.values())}
    if measured:
      pictures[table.title] = Picture(
        figures.accuracy_bars(measured, folder / f"table-{number}.png"),
        "Each group is a column of the table, each colour a row: the mean over seeds, with one standard deviation up and down.",
      )
  return pictures


def top1_results(
  table: Table, results: Results, columns: Mapping[str, str]
) -> dict[str, dict[str, dict[str, Any] | None]]:
  """`{bits: {row: {top1, std, seeds, count}}}` of some columns of accuracies, for report.json; None where not measured.

  Args:
    table: in fractions.
    results: of the table.
    columns: `{column: bits}`.
  """
  found: dict[str, dict[str, dict[str, Any] | None]] = {}
  for column, bits in columns.items():
    found[bits] = {}
    for row in table.rows:
      entry = results.get((row, column))
      over = over_seeds(entry)
      count = next((record.get("count") for record in entry.records.values()), None) if entry else None
      found[bits][row] = over and {"top1": over.mean, "std": over.std, "seeds": list(over.seeds), "count": count}
  return found


def remove(folder: pathlib.Path) -> None:
  """Remove the checkpoints of a cell that is stored."""
  shutil.rmtree(folder, ignore_errors=True)


def _bar(entry: Entry | None) -> tuple[float, float, float] | None:
  found = over_seeds(entry)
  if found is None or found.mean is None:
    return None
  std = found.std or 0.0
  return found.mean, max(0.0, found.mean - std), min(1.0, found.mean + std)
