"""The frame of every study: tables whose cells are measured one by one, seed by seed, over as many runs as one likes.

A study says which tables it has and how one cell is measured (`Study`); the frame chooses cells, remembers every value
under the settings it depends on, and writes report.json, report.html, tables.csv and figures after each run.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments._harness import study_report
from experiments._harness.image_sets import digest
from experiments._harness.study_options import Missing as Missing
from experiments._harness.study_options import StudyOptions as StudyOptions
from experiments._harness.study_options import check_seeds
from experiments._harness.study_setup import Setup as Setup
from experiments._harness.study_setup import load
from experiments._harness.tables import Entry, Results, Table, cell_text
from kwjax.cli.command import get_network, in_workdir, start
from kwjax.cli.options import REMEDY, sizes
from kwjax.compression.workspace import Workspace
from kwjax.errors import CheckpointError, KwjaxError
from kwjax.network import Network
from kwjax.runtime.devices import memory, processes
from kwjax.runtime.files import read_sealed_json
from kwjax.runtime.reporting.messages import log
from kwjax.runtime.result_store import ResultStore
from kwjax.runtime.workdir import Shutdown


class CellPlan(NamedTuple):
  """How one cell is measured.

  Attributes:
    settings: everything but the seed that the value depends on, JSON-able; cells with other settings are kept apart.
    protocol: the same for people, in one line.
    compute: `(workspace, seed) -> value`, or a mapping with `value` and whatever else is worth keeping.
    seeded: False for a value without randomness; it is measured once.
  """

  settings: Mapping[str, Any]
  protocol: str
  compute: Callable[[Workspace, int], float | Mapping[str, Any]]
  seeded: bool = True


@dataclasses.dataclass(frozen=True)
class Study:
  """A study as the frame sees it; see the attributes.

  Attributes:
    tables: what it fills.
    plan: `(table, row, column) -> CellPlan`, None for a cell that stays empty; raises `Missing` for one that needs an
      option that was not given. Called before any work, so it must be cheap.
    protocol: what holds for all cells, `{name: text}`.
    describe: number of images, steps and the like of some cells in a line or two, for --dry-run.
    report: further keys of report.json from `{table title: Results}`.
    figures: draws into a folder; `{title: PNG}`. Default: bars of every table of accuracies.
    need: memory at the peak, checked before work begins.
  """

  tables: tuple[Table, ...]
  plan: Callable[[Table, str, str], CellPlan | None]
  protocol: Mapping[str, str] = dataclasses.field(default_factory=dict)
  describe: Callable[[Sequence[Cell]], str] = lambda cells: ""
  report: Callable[[Workspace, Mapping[str, Results]], Mapping[str, Any]] = lambda workspace, results: {}
  figures: study_report.Figures = study_report.draw_bars
  need: memory.Need | None = None


class Cell(NamedTuple):
  """One value to measure."""

  table: Table
  row: str
  column: str
  seed: int
  plan: CellPlan

  @property
  def folder(self) -> str:
    """Stages of this cell's seeds; only values of equal settings share one."""
    names = [re.sub(r"[^A-Za-z0-9.+-]+", "_", text) for text in (self.row, self.column)]
    return "/".join(["cells", *names, digest([self.table.title, self.row, self.column, self.plan.settings])])

  @property
  def stage(self) -> str:
    """Name of its stage."""
    return f"{self.folder}/seed-{self.seed}"


def run(
  options: StudyOptions,
  *,
  name: str,
  build: Callable[[Setup], Study],
  arch: str,
  default: str | None = None,
  make: Callable[[], Network] | None = None,
) -> int:
  """A whole study for one command line.

  Args:
    options: the command line.
    name: of the study, for its folder.
    build: checks what the study needs and describes it.
    arch: an architecture that suits it, for the sentence that says how to get a network.
    default: architecture of the embedded network that is used when none is given, or None.
    make: makes the network of a study that needs none from outside, once the devices are chosen; or None.

  Returns:
    exit status 0.

  Raises:
    KwjaxError: anything the user can mend.
    Interrupted: the run was asked to stop.
  """
  named = default is not None or options.network or options.arch or options.weights
  if make is None and not named:
    raise Missing(
      f"no network was given: --network FOLDER, written by python -m weights_conversion --arch {arch} --source FILE --out FOLDER"
    )
  check_seeds(options.seeds)
  group = start(options.devices, options.coordinator, options.num_processes, options.process_id)
  main_job = options.main_job()
  network = make() if make else get_network(options.network, options.arch, options.weights, default=default)
  chosen = dataclasses.replace(sizes(main_job, network), held_out=0)
  study = build(load(options, network, group, chosen))
  cells, left_out = choose(study, options)
  folder = options.workdir or pathlib.Path("runs") / f"{name}-{network.name}"
  for sentence in left_out:
    log(sentence)
  if options.dry_run and processes.is_main():
    done = sum((folder / "stages" / f"{cell.stage}.json").exists() for cell in cells)
    print(f"{len(cells)} cells, {done} of them finished in {folder}\n{study.describe(cells)}")
  if study.need:
    memory.check(study.need, group.local.devices, remedy=REMEDY)
  if options.dry_run:
    return 0
  _check_same(cells)

  def work(folder: pathlib.Path, shutdown: Shutdown) -> None:
    workspace = Workspace(
      network,
      group,
      ResultStore(folder, {"study": name}),
      lambda: shutdown.requested,
      folder,
      options.checkpoint_seconds,
      options.checkpoint_steps,
    )
    for number, cell in enumerate(cells, 1):
      measure_cell(workspace, cell, f"[{number}/{len(cells)}]")
    study_report.finish(workspace, study, collect(study, workspace.results), options.seeds)

  in_workdir(folder, work, resume=options.resume)
  return 0


def choose(study: Study, options: StudyOptions) -> tuple[list[Cell], list[str]]:
  """The cells that --rows, --columns and --seeds ask for, and a sentence for each reason that cells are left out.

  Raises:
    KwjaxError: a name is unknown; the known ones are listed.
    Missing: nothing is left of a row or column that was asked for by name, or at all.
  """
  for option, asked, known in (
    ("--rows", options.rows, [row for table in study.tables for row in table.rows]),
    ("--columns", options.columns, [column for table in study.tables for column in table.columns]),
  ):
    unknown = [name for name in asked if name not in known]
    if unknown:
      raise KwjaxError(f"{option} has no {unknown[0]!r}; known: {', '.join(dict.fromkeys(known))}")
  cells: list[Cell] = []
  left_out: list[tuple[str, str, Missing]] = []
  for seed in options.seeds:
    for table in study.tables:
      for row in options.rows or table.rows:
        for column in options.columns or [c for c in table.columns if c not in table.optional]:
          if row not in table.rows or column not in table.columns:
            continue
          try:
            plan = study.plan(table, row, column)
          except Missing as missing:
            left_out.append((row, column, missing))
            continue
          if plan is not None and (plan.seeded or seed == options.seeds[0]):
            cells.append(Cell(table, row, column, seed if plan.seeded else 0, plan))
  rows, columns = {cell.row for cell in cells}, {cell.column for cell in cells}
  for row, column, reason in left_out:
    if not cells or (row in options.rows and row not in rows) or (column in options.columns and column not in columns):
      raise reason
  return cells, [f"left out: {text}" for text in dict.fromkeys(str(reason) for _, _, reason in left_out)]


def measure_cell(workspace: Workspace, cell: Cell, progress: str) -> None:
  """Measure a cell unless its value is there already."""
  scratch = workspace.folder / "distillation" / digest(cell.stage)
  computed = []

  def compute() -> dict[str, Any]:
    begin = time.perf_counter()
    found = cell.plan.compute(workspace._replace(scratch=scratch), cell.seed)
    record = dict(found) if isinstance(found, Mapping) else {"value": found}
    computed.append(time.perf_counter() - begin)
    return {**record, "seconds": computed[-1], "protocol": cell.plan.protocol}

  workspace.stop_if_asked()
  record = workspace.results.once(cell.stage, compute)
  processes.from_main(lambda: study_report.remove(scratch))
  text = cell_text(Entry({cell.seed: record}, seeded=False), cell.table.unit_of(cell.column))
  when = f"in {computed[0]:.1f} s" if computed else "(measured before)"
  seed = f", seed {cell.seed}" if cell.plan.seeded else ""
  log(f"{progress} {cell.row}, {cell.column}{seed}: {text} {when}")


def collect(study: Study, results: ResultStore) -> dict[str, Results]:
  """Everything that the folder holds for the cells of a study under its present settings, whatever the run."""
  found: dict[str, Results] = {}
  for table in study.tables:
    entries = {}
    for row in table.rows:
      for column in table.columns:
        try:
          plan = study.plan(table, row, column)
        except Missing:
          continue
        if plan is not None:
          records = dict(_records(results, Cell(table, row, column, 0, plan).folder))
          entries[row, column] = Entry(records, plan.protocol, plan.seeded)
    found[table.title] = entries
  return found


def _records(results: ResultStore, folder: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
  assert results.folder is not None
  for path in sorted((results.folder / "stages" / folder).glob("seed-*.json")):
    try:
      yield int(path.stem.removeprefix("seed-")), read_sealed_json(path)["result"]
    except CheckpointError as error:
      log(f"{error}; it is left out of the table, and measured again when its seed is asked for")


def _check_same(cells: Sequence[Cell]) -> None:
  """Refuse processes of one run that would not do the same work."""
  everybody = processes.exchange(json.loads(json.dumps([cell.stage for cell in cells])))
  for index, stages in enumerate(everybody):
    if stages != everybody[0]:
      raise KwjaxError(f"process {index} of {len(everybody)} was started with other options, network or data than 0")
