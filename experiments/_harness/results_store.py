"""What is kept of a finished run for docs/results.md: its tables with what is needed to judge them, as one small JSON file."""

from __future__ import annotations

import datetime
import json
import pathlib
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments._harness.results_merge import merged
from experiments._harness.tables import PERCENT, Entry, Results, Table
from kwjax.errors import KwjaxError
from kwjax.runtime.files import write_json
from kwjax.runtime.reporting.report import network_name

SECTIONS = {
  "table1_ablation": "Table 1: intermediate losses and mixup, by number of samples",
  "table2_cifar": "Table 2: calibration and distillation by data source, CIFAR",
  "table3_imagenet": "Table 3: calibration and distillation by data source, ImageNet",
  "table4_similarity": "Tables 4 and 7: J_KL of data sets, and what it detects",
  "table5_sigma": "Table 5: the smoothing kernel",
  "table6_objectives": "Table 6: number of images, and KL against CE",
  "table_calibration": "Ways to calibrate: ranges, bias correction, equalization",
  "table_mixed": "Bits by layer against equal bits, at equal size",
  "noise_distill": "Distillation from noise",
  "noise_activations": "What noise does inside a network",
  "toy_circles": "A toy problem: circles learnt from noise",
  "leaves_bns": "Dead leaves to start from, and noise to calibrate with",
  "figure2_monitor": "Figure 2: J_KL under the inception loss, smoothness under BNS",
  "figure3_quality": "Figure 3: accuracy by number and quality of images",
  "figure5_images": "Figure 5: the images",
  "figure7_bias": "Figure 7: bias of the predictions",
}
"""Heading of each study, in the order of the page."""

_MODULES = {
  "table_calibration": "calibration.table_calibration",
  "table_mixed": "calibration.table_mixed",
  "noise_distill": "noise.distill",
  "noise_activations": "noise.activations",
  "toy_circles": "noise.toy_circles",
  "leaves_bns": "noise.leaves_bns",
}


def module_of(study: str) -> str:
  """Name of the module that runs a study: `experiments.knowledge_within.table2_cifar`."""
  return f"experiments.{_MODULES.get(study, f'knowledge_within.{study}')}"


_KEYS = (
  "study",
  "network",
  "date",
  "machine",
  "command",
  "seconds",
  "float",
  "protocol",
  "notes",
  "versions",
  "tables",
  "figures",
)
_VERSIONS = ("python", "kwjax", "jax", "flax", "optax")
_TABLE = ("title", "rows", "columns", "note", "cells")
_CELL = ("values", "seeds", "unit", "paper", "protocol", "seconds")
_LARGEST_FIGURE = 400_000  # bytes; they are kept in the repository
# An absolute path, or one that begins with . or .. or ~, up to its last part: it says nothing on another machine.
_FOLDERS = re.compile(r"(?<![\w.~/)\]-])(?:/|(?:\.{1,2}|~)/)(?=[\w.])(?:[\w.+@-]+/)*")


class Stored(NamedTuple):
  """A kept report; see `reduced`.

  Attributes:
    name: of its file, without `.json`.
    content: with the keys of `reduced`.
  """

  name: str
  content: Mapping[str, Any]


def reduced(run: pathlib.Path, *, machine: str | None = None) -> dict[str, Any]:
  """What is kept of the run in a folder.

  Cells keep the value of every seed, in the unit of the table; means are taken anew where they are shown. Folders are cut
  off paths, and `--workdir` off the command, because they differ from machine to machine.

  Args:
    run: folder of a study with report.json and settings.json.
    machine: what it ran on; by default what report.json knows, the kind and number of devices.

  Returns:
    `study`, `network`, `date` (of the report, UTC), `machine`, `command` (the last one of the run), `seconds` (of all cells),
    `float`, `protocol`, `notes` (sentences of the study), `versions`, `tables` and `figures` (none yet).

  Raises:
    KwjaxError: the folder holds no finished study, or an unknown one.
  """
  report, settings = _json(run / "report.json"), _json(run / "settings.json")
  study, tables = settings.get("study"), report.get("tables")
  if not isinstance(study, str) or not isinstance(tables, list):
    raise KwjaxError(f"{run} is no folder of a study: its settings.json names none, or its report.json has no tables")
  _check_study(run, study)
  written = datetime.datetime.fromtimestamp((run / "report.json").stat().st_mtime, datetime.UTC)
  kept_tables = [
    {**{key: table[key] for key in _TABLE if key != "cells"}, "cells": _cells(table["cells"])} for table in tables
  ]
  every = [cell for table in kept_tables for row in table["cells"].values() for cell in row.values()]
  versions = report.get("versions") or {}
  return neutral(
    {
      "study": study,
      "network": network_name(report),
      "date": written.date().isoformat(),
      "machine": machine or _machine(versions),
      "command": without_workdir(report.get("command") or ""),
      "seconds": round(sum(cell["seconds"] for cell in every), 1),
      "float": report.get("float"),
      "protocol": report.get("protocol") or {},
      "notes": report.get("notes") or [],
      "versions": {name: versions.get(name) for name in _VERSIONS},
      "tables": kept_tables,
      "figures": [],
    }
  )


def collect(
  run: pathlib.Path,
  folder: pathlib.Path,
  images: pathlib.Path,
  *,
  name: str | None,
  figures: Sequence[str],
  machine: str | None,
  merge: bool = False,
) -> pathlib.Path:
  """Keep a run's report, and copies of some of its figures.

  Args:
    run: folder of a study.
    folder: where the reports are kept.
    images: where the figures are kept.
    name: of the file; by default STUDY-NETWORK.
    figures: names of files in the run's `figures` folder.
    machine: see `reduced`.
    merge: keep what the file of the same name has and this run has not, figures included, see `results_merge.merged`.

  Returns:
    the file written; one of the same name is replaced.

  Raises:
    KwjaxError: the folder holds no finished study, or a figure is not there or too large to be kept.
  """
  content = reduced(run, machine=machine)
  name = name or f"{content['study']}-{re.sub(r'[^A-Za-z0-9.-]+', '_', content['network'])}"
  sources = [run / "figures" / figure for figure in figures]
  for source in sources:
    if not source.is_file():
      there = ", ".join(sorted(path.name for path in (run / "figures").glob("*.png"))) or "none"
      raise KwjaxError(f"{run} has no figure {source.name}; there are: {there}")
    if (size := source.stat().st_size) > _LARGEST_FIGURE:
      raise KwjaxError(f"{source} has {size:,} bytes, more than the {_LARGEST_FIGURE:,} of a figure that is kept")
  kept, shown = folder / f"{name}.json", [f"{name}.{source.name}" for source in sources]
  if merge and kept.is_file():
    earlier = _json(kept)
    content = merged(content, earlier)
    shown = [*earlier["figures"], *(figure for figure in shown if figure not in earlier["figures"])]
  for old in images.glob(f"{name}.*.png"):
    if old.name not in shown:
      old.unlink()
  images.mkdir(parents=True, exist_ok=True)
  for source in sources:
    shutil.copyfile(source, images / f"{name}.{source.name}")
  return write_json(kept, {**content, "figures": shown})


def read(folder: pathlib.Path) -> list[Stored]:
  """All kept reports of a folder, by name.

  Raises:
    KwjaxError: a file is damaged, lacks a key, or is of no known study.
  """
  found = []
  for path in sorted(folder.glob("*.json")):
    content = _json(path)
    missing = [key for key in _KEYS if key not in content]
    missing += [f"tables.{key}" for table in content.get("tables", ()) for key in _TABLE if key not in table]
    if missing:
      raise KwjaxError(f"{path} is no kept report: it lacks {', '.join(missing)}; --collect writes one")
    _check_study(path, content["study"])
    found.append(Stored(path.stem, content))
  return found


def as_table(stored: Mapping[str, Any]) -> tuple[Table, Results]:
  """A kept table, filled, in the form in which the studies hold it."""
  paper, units, results = {}, {}, {}
  for row, columns in stored["cells"].items():
    for column, cell in columns.items():
      units[column] = cell["unit"]
      if cell["paper"] is not None:
        paper[row, column] = cell["paper"]
      factor = 100.0 if cell["unit"] == PERCENT else 1.0
      values = [value if value is None else value / factor for value in cell["values"]]
      records = dict(zip(cell["seeds"] or [0], ({"value": value} for value in values)))
      results[row, column] = Entry(records, cell["protocol"] or "", seeded=bool(cell["seeds"]))
  table = Table(stored["title"], tuple(stored["rows"]), tuple(stored["columns"]), paper, units, note=stored["note"])
  return table, results


def neutral(value: Any) -> Any:
  """A JSON-able value with the folders cut off all paths in its texts that name a place on one machine.

  `/data/cifar10.npz:test`, `../cifar10.npz:test` and `~/cifar10.npz:test` all become `cifar10.npz:test`.
  """
  if isinstance(value, str):
    return _FOLDERS.sub("", value)
  if isinstance(value, Mapping):
    return {neutral(key): neutral(item) for key, item in value.items()}
  return [neutral(item) for item in value] if isinstance(value, (list, tuple)) else value


def without_workdir(command: str) -> str:
  """A command line without `--workdir FOLDER`."""
  kept: list[str] = []
  words = iter(shlex.split(command))
  for word in words:
    if word == "--workdir":
      next(words, None)
    elif not word.startswith("--workdir="):
      kept.append(word)
  return shlex.join(kept)


def _cells(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
  def one(cell: Mapping[str, Any]) -> dict[str, Any]:
    seconds = round(sum(record.get("seconds", 0.0) for record in cell["records"].values()), 1)
    # A cell that was not measured has the protocol of one that could be.
    protocol = cell["protocol"] if cell["values"] else None
    return {key: {**cell, "protocol": protocol, "seconds": seconds}[key] for key in _CELL}

  return {row: {column: one(cell) for column, cell in columns.items()} for row, columns in cells.items()}


def _check_study(path: pathlib.Path, study: str) -> None:
  if study not in SECTIONS:
    raise KwjaxError(f"{path} is of the study {study!r}, which has no section; known: {', '.join(SECTIONS)}")


def _machine(versions: Mapping[str, Any]) -> str:
  if versions.get("backend") in (None, "cpu"):
    return f"{versions.get('cpu_count') or 'unknown number of'} CPU cores"
  return f"{versions.get('devices')} x {versions.get('device')}"


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text())
  except OSError as error:
    raise KwjaxError(f"cannot read {path}: {error.strerror or error}") from error
  except ValueError as error:
    raise KwjaxError(f"{path} is no JSON: {error}") from error
  if not isinstance(value, dict):
    raise KwjaxError(f"{path} holds {type(value).__name__}, expected an object")
  return value
