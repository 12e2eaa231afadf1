"""A published table filled with our own numbers: statistics over seeds, text, CSV, rows of the report, JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kwjax.runtime.files import atomic_write

PERCENT = "%"
NOT_MEASURED = "not measured"
_CSV_COLUMNS = ("table", "row", "column", "unit", "mean", "std", "seeds", "values", "paper", "protocol")


@dataclasses.dataclass(frozen=True)
class Table:
  """What a table shows beside what was measured.

  Attributes:
    title: one line.
    rows: their names, in order.
    columns: their names, in order.
    paper: published numbers of some cells, in `unit`, or texts.
    unit: of all columns, or `{column: unit}`; values of unit "%" are fractions in [0, 1], shown times 100.
    optional: columns that are measured only when they are asked for by name.
    note: what a reader must know to compare the two.
  """

  title: str
  rows: tuple[str, ...]
  columns: tuple[str, ...]
  paper: Mapping[tuple[str, str], float | str] = dataclasses.field(default_factory=dict)
  unit: str | Mapping[str, str] = PERCENT
  optional: tuple[str, ...] = ()
  note: str = ""

  def __post_init__(self) -> None:
    unknown = [cell for cell in self.paper if cell[0] not in self.rows or cell[1] not in self.columns]
    if unknown:
      raise ValueError(f"{self.title}: published numbers of cells that it does not have: {unknown}")

  def unit_of(self, column: str) -> str:
    """Unit of a column."""
    return self.unit if isinstance(self.unit, str) else self.unit.get(column, "")


class Entry(NamedTuple):
  """What was measured for one cell.

  Attributes:
    records: `{seed: {"value": number or None, ...}}`; empty where nothing was.
    protocol: how, in one line.
    seeded: whether the value depends on a seed at all.
  """

  records: Mapping[int, Mapping[str, Any]]
  protocol: str = ""
  seeded: bool = True


Results = Mapping[tuple[str, str], Entry]
"""`{(row, column): Entry}` of one table."""


class Statistics(NamedTuple):
  """Mean and sample standard deviation over seeds.

  Attributes:
    mean: None where a value is not finite.
    std: sqrt(sum (x - mean)^2 / (n - 1)); None for fewer than two values.
    seeds: ascending.
    values: in the order of the seeds.
  """

  mean: float | None
  std: float | None
  seeds: tuple[int, ...]
  values: tuple[float | None, ...]


def over_seeds(entry: Entry | None) -> Statistics | None:
  """Statistics of a cell; None where nothing was measured."""
  if entry is None or not entry.records:
    return None
  seeds = tuple(sorted(entry.records))
  values = tuple(entry.records[seed]["value"] for seed in seeds)
  finite = [value for value in values if value is not None and math.isfinite(value)]
  if len(finite) < len(values):
    return Statistics(None, None, seeds, values)
  std = statistics.stdev(finite) if len(finite) > 1 else None
  return Statistics(statistics.fmean(finite), std, seeds, values)


def number(value: float, unit: str) -> str:
  """A value as it is printed: "%" with two decimals, times 100; anything else with four significant digits."""
  return f"{100 * value:.2f}" if unit == PERCENT else f"{value:#.4g}".rstrip(".")


def cell_text(entry: Entry | None, unit: str, *, name_seeds: bool = False) -> str:
  """`93.18 ± 0.05 (3)`: mean, standard deviation, number of seeds or the seeds themselves."""
  found = over_seeds(entry)
  if found is None or entry is None:
    return NOT_MEASURED
  text = "not finite" if found.mean is None else number(found.mean, unit)
  if not entry.seeded:
    return text
  if found.std is not None:
    text += f" ± {100 * found.std:.2f}" if unit == PERCENT else f" ± {found.std:.2g}"
  listed = "seed " + ",".join(map(str, found.seeds)) if name_seeds else str(len(found.seeds))
  return f"{text} ({listed})"


def as_text(table: Table, results: Results) -> str:
  """The table for a terminal: a line of ours and, where there is something, a line of the paper's a row."""
  measured = {over_seeds(entry) for entry in results.values() if entry.seeded}
  seeds = {found.seeds for found in measured if found is not None}
  lines = [["", *(_heading(table, column) for column in table.columns)]]
  for row in table.rows:
    cells = [(results.get((row, column)), table.unit_of(column)) for column in table.columns]
    lines.append([row, *(cell_text(entry, unit, name_seeds=len(seeds) > 1) for entry, unit in cells)])
    published = [_published(table, row, column) for column in table.columns]
    if any(published):
      lines.append(["  paper", *published])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  body = ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines]
  explained = f"mean ± standard deviation ({'seeds' if len(seeds) > 1 else 'number of seeds'})"
  if len(seeds) == 1:
    explained += f"; seeds {', '.join(map(str, *seeds))}"
  return "\n".join([table.title, "", *body, "", explained, *([table.note] if table.note else [])])


def as_rows(table: Table, results: Results) -> list[dict[str, str | None]]:
  """Rows of the report's HTML table: ours and the paper's in one cell, None where nothing was measured or published."""
  rows = []
  for row in table.rows:
    line: dict[str, str | None] = {"": row}
    for column in table.columns:
      entry, published = results.get((row, column)), _published(table, row, column)
      ours = cell_text(entry, table.unit_of(column)) if over_seeds(entry) else None
      both = f"{ours or NOT_MEASURED}; paper {published}" if published else ours
      line[_heading(table, column)] = both
    rows.append(line)
  return rows


def as_json(table: Table, results: Results) -> dict[str, Any]:
  """The table for programs; means in the table's units, as `cells[row][column]`, with `mean` null where not measured."""
  cells: dict[str, dict[str, Any]] = {row: {} for row in table.rows}
  for row in table.rows:
    for column in table.columns:
      entry, found = results.get((row, column)), over_seeds(results.get((row, column)))
      factor = 100.0 if table.unit_of(column) == PERCENT else 1.0
      cells[row][column] = {
        "mean": _scaled(found.mean if found else None, factor),
        "std": _scaled(found.std if found else None, factor),
        "seeds": list(found.seeds) if found and entry and entry.seeded else [],
        "values": [_scaled(value, factor) for value in found.values] if found else [],
        "unit": table.unit_of(column),
        "paper": table.paper.get((row, column)),
        "protocol": entry.protocol if entry else None,
        "records": {str(seed): dict(record) for seed, record in entry.records.items()} if entry else {},
      }
  return {"title": table.title, "rows": table.rows, "columns": table.columns, "note": table.note, "cells": cells}


def write_csv(path: pathlib.Path, filled: Sequence[tuple[Table, Results]]) -> pathlib.Path:
  """All cells of all tables, one a line, in the units of the tables; empty where nothing was measured or published."""
  text = io.StringIO()
  writer = csv.DictWriter(text, _CSV_COLUMNS, lineterminator="\n")
  writer.writeheader()
  for table, results in filled:
    for row, columns in as_json(table, results)["cells"].items():
      for column, cell in columns.items():
        line = {name: cell[name] for name in ("unit", "mean", "std", "paper", "protocol")}
        seeds, values = (" ".join("" if v is None else f"{v}" for v in cell[name]) for name in ("seeds", "values"))
        writer.writerow({"table": table.title, "row": row, "column": column, **line, "seeds": seeds, "values": values})
  return atomic_write(path, text.getvalue().encode())


def _heading(table: Table, column: str) -> str:
  unit = table.unit_of(column)
  return column if isinstance(table.unit, str) or not unit else f"{column} ({unit})"


def _published(table: Table, row: str, column: str) -> str:
  value = table.paper.get((row, column))
  return "" if value is None else value if isinstance(value, str) else f"{value:g}"


def _scaled(value: float | None, factor: float) -> float | None:
  # 100 * 0.9331 is 93.30999999999999
  return None if value is None else float(f"{factor * value:.10g}")
