"""Two kept reports of one study as one: a table can be filled on several days, on machines that forget their runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kwjax.errors import KwjaxError

_EMPTY = {"paper": None, "protocol": None, "seconds": 0.0}


def merged(run: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
  """A run's report with the rows, cells and seeds of a kept one that it has not; where both have a seed, the run's.

  Seeds of a cell come together where both were measured in the same way, by their protocol; where not, the run's stay. Rows
  of the kept report that the run does not know come last.

  Args:
    run: of `reduced`.
    kept: of `reduced` earlier, of the same study and network.

  Raises:
    KwjaxError: they are of two studies or networks.
  """
  for key in ("study", "network"):
    if run[key] != kept[key]:
      raise KwjaxError(f"cannot merge: the run's {key} is {run[key]!r}, that of the kept report {kept[key]!r}")
  earlier = {table["title"]: table for table in kept["tables"]}
  tables = [_merged_table(table, earlier.get(table["title"])) for table in run["tables"]]
  every = [cell for table in tables for row in table["cells"].values() for cell in row.values()]
  return {
    **run,
    "tables": tables,
    # A sentence may speak of any cell, so that of one that is no longer there would be wrong.
    "notes": list(dict.fromkeys([*([] if _replaces(tables, earlier) else kept["notes"]), *run["notes"]])),
    "seconds": round(sum(cell["seconds"] for cell in every), 1),
  }


def _replaces(tables: Sequence[Mapping[str, Any]], earlier: Mapping[str, Mapping[str, Any]]) -> bool:
  """Whether a value of the kept tables is not in the merged ones."""
  found = {table["title"]: table["cells"] for table in tables}
  return any(
    not set(cell["values"]) <= set(found.get(title, {}).get(row, {}).get(column, {}).get("values", ()))
    for title, table in earlier.items()
    for row, cells in table["cells"].items()
    for column, cell in cells.items()
  )


def _merged_table(run: Mapping[str, Any], kept: Mapping[str, Any] | None) -> dict[str, Any]:
  if kept is None:
    return dict(run)
  union: Callable[[str], list[str]] = lambda key: list(dict.fromkeys([*run[key], *kept[key]]))

  def empty(column: str) -> dict[str, Any]:
    return {"values": [], "seeds": [], "unit": _unit(run, kept, column), **_EMPTY}

  cells = {
    row: {
      column: _merged_cell(run["cells"].get(row, {}).get(column), kept["cells"].get(row, {}).get(column))
      or empty(column)
      for column in union("columns")
    }
    for row in union("rows")
  }
  return {**run, "rows": union("rows"), "columns": union("columns"), "cells": cells}


def _merged_cell(run: Mapping[str, Any] | None, kept: Mapping[str, Any] | None) -> dict[str, Any] | None:
  if run is None or not run["values"]:
    return dict(kept or run or {}) if kept is not None and kept["values"] else (None if run is None else dict(run))
  if kept is None or not kept["values"] or kept["protocol"] != run["protocol"] or not run["seeds"]:
    return dict(run)
  values = {**dict(zip(kept["seeds"], kept["values"])), **dict(zip(run["seeds"], run["values"]))}
  seeds = sorted(values)
  return {
    **run,
    "values": [values[seed] for seed in seeds],
    "seeds": seeds,
    "seconds": round(run["seconds"] + kept["seconds"], 1),
  }


def _unit(run: Mapping[str, Any], kept: Mapping[str, Any], column: str) -> str:
  every = [row[column] for table in (run, kept) for row in table["cells"].values() if column in row]
  return str(every[0]["unit"])
