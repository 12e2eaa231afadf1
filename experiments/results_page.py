"""docs/results.md: every table of the paper with our numbers beside its own, from the reports of finished runs, never typed.

    python -m experiments.knowledge_within.table2_cifar --network networks/resnet44 --eval-data cifar10.npz:test --seeds 0 1 2
    python -m experiments.results_page --collect runs/table2_cifar-resnet44 --figures table-0.png
    python -m experiments.results_page --out docs/results.md

`--collect` keeps what the page needs of a run: one small JSON file a run in `results/` beside the page, and the figures
that are named in `images/results/`. The page is always made out of all that is kept there, so it is the same wherever it is
made; `--runs` shows runs that are not kept. Words about a study stand in `results/STUDY.md`, where
`{{STORED | ROW | COLUMN}}` stands for our number in a cell of the kept report STORED.json, so that none is typed a second time.
"""

from __future__ import annotations

import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from experiments._harness import published, results_store
from experiments._harness.results_store import SECTIONS, Stored
from experiments._harness.tables import NOT_MEASURED, Results, Table, as_rows, cell_text, over_seeds
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.errors import KwjaxError
from kwjax.runtime.files import atomic_write
from kwjax.runtime.reporting.messages import log

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")]
Folders = Annotated[tuple[pathlib.Path, ...], tyro.conf.arg(metavar="FOLDER")]

_PREFACE = """# Results

Made by `python -m experiments.results_page` out of the reports in [results]({reports}); not written by hand.

The numbered tables and figures are those of [Haroush et al. (2020), The Knowledge Within](https://arxiv.org/abs/1912.01274);
the paper's numbers are those of its own networks. A cell: mean ± standard deviation over seeds (number of seeds), then the
paper's number. No deviation: one seed; no number of seeds: nothing is random. Under each table stand the machine, the
date, the last command of the run (a table can be filled over several) and how every cell was measured.
"""
_REFERENCE = re.compile(r"\{\{([^|{}]+)\|([^|{}]+)\|([^|{}]+)\}\}")


@dataclass(frozen=True)
class Options:
  """Options of the page."""

  collect: Folders = ()
  """Folders of finished studies whose reports are kept, before the page is made."""
  name: str | None = None
  """Name under which the one run of --collect is kept. Default: STUDY-NETWORK."""
  figures: Names = ()
  """Files in the `figures` folder of the one run of --collect that are kept and shown."""
  merge: bool = False
  """Keep the rows, cells, seeds and figures of the kept report of the same name that the one run of --collect has not."""
  machine: str | None = None
  """What the runs of --collect ran on. Default: number of CPU cores, or number and kind of accelerators."""
  runs: Folders = ()
  """Show these runs instead of what is kept, without figures: a look before they are kept."""
  out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE")] = pathlib.Path("docs/results.md")
  """The page. What is kept lies in `results` and `images/results` beside it."""


def run(options: Options) -> int:
  """Keep what is to be kept, and make the page; returns exit status 0.

  Raises:
    KwjaxError: a run or a kept report is unusable, or the words about a study name a cell that there is not.
  """
  folder, images = options.out.parent / "results", options.out.parent / "images" / "results"
  if len(options.collect) != 1 and (options.name or options.figures or options.merge):
    raise KwjaxError(
      f"--name, --figures and --merge belong to the one run of --collect, found {len(options.collect)} runs"
    )
  for source in options.collect:
    kept = results_store.collect(
      source,
      folder,
      images,
      name=options.name,
      figures=options.figures,
      machine=options.machine,
      merge=options.merge,
    )
    log(f"kept {kept}")
  if options.runs:
    stored = [Stored(source.name, results_store.reduced(source, machine=options.machine)) for source in options.runs]
  else:
    stored = results_store.read(folder)
  atomic_write(options.out, render(stored, notes(folder), images=os.path.relpath(images, options.out.parent)).encode())
  log(f"{options.out}: {len(stored)} reports")
  return 0


def notes(folder: pathlib.Path) -> dict[str, str]:
  """Words about each study, from `STUDY.md`.

  Raises:
    KwjaxError: a file belongs to no study, so that it would be shown nowhere.
  """
  found = {path.stem: path.read_text().strip() for path in sorted(folder.glob("*.md"))}
  unknown = [name for name in found if name not in SECTIONS]
  if unknown:
    raise KwjaxError(f"{folder / unknown[0]}.md belongs to no study; known: {', '.join(SECTIONS)}")
  return found


def render(stored: Sequence[Stored], notes: Mapping[str, str], *, images: str = "images/results") -> str:
  """The page; equal reports and notes give equal pages.

  Args:
    stored: the reports, in any order.
    notes: texts about studies, `{study: text}`; `{{STORED | ROW | COLUMN}}` in it stands for a number of ours.
    images: folder of the figures, as seen from the page.

  Raises:
    KwjaxError: a text names a cell that there is not.
  """
  parts = [_PREFACE.format(reports="results")]
  for study, heading in SECTIONS.items():
    parts.append(f"## {_plain(heading)}\n")
    own = sorted((report for report in stored if report.content["study"] == study), key=lambda report: report.name)
    if not own:
      parts.append(f"{NOT_MEASURED.capitalize()} yet: `python -m {results_store.module_of(study)} --help` says how.\n")
    if study in notes:
      parts.append(f"{_filled(notes[study], study, stored)}\n")
    for report in own:
      parts += _report(report, images)
    parts += [_unmeasured(study, known) for known in published.unmeasured(study, own)]
  return "\n".join(parts)


def _report(report: Stored, images: str) -> list[str]:
  content = report.content
  parts: list[str] = []
  for kept in content["tables"]:
    table, results = results_store.as_table(kept)
    parts.append(f"**{_plain(table.title)}**\n\n{_markdown(table, results)}\n")
    if table.note:
      parts.append(f"{_plain(table.note)}\n")
    if protocols := _protocols(table, results):
      shown = "\n".join(protocols)
      parts.append(f"<details><summary>How every cell was measured</summary>\n\n{shown}\n\n</details>\n")
  for figure in content["figures"]:
    caption = pathlib.Path(figure.removeprefix(f"{report.name}.")).stem.replace("_", " ").replace("-", " ")
    parts.append(f"![{content['network']}: {caption}]({images}/{figure})\n")
  parts.append("\n".join(_facts(content)) + "\n")
  return parts


def _markdown(table: Table, results: Results) -> str:
  """A table; a cell that was neither measured nor published says so."""
  lines = [
    {_plain(name): _plain(str(value or NOT_MEASURED)) for name, value in row.items()} for row in as_rows(table, results)
  ]
  return _grid([list(lines[0]), *(list(line.values()) for line in lines)])


def _grid(lines: Sequence[Sequence[str]]) -> str:
  """Lines of cells, the first one the header."""
  header, *body = lines
  return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *body])


def _unmeasured(study: str, known: published.Unmeasured) -> str:
  """The paper's numbers alone, and why there are none of ours."""
  table = known.table
  number = lambda value: "" if value is None else f"{value:g}"
  lines = [[row, *(number(table.paper.get((row, column))) for column in table.columns)] for row in table.rows]
  grid = _grid([["", *map(_plain, table.columns)], *lines])
  words = (
    f"{_plain(table.note)} The paper's numbers, as far as known to us; not measured here: {known.reason}. "
    f"`python -m {results_store.module_of(study)} --preset paper` measures them{known.how}."
  )
  return f"**The paper's {_plain(table.title)}**\n\n{grid}\n\n{words.strip()}\n"


def _facts(content: Mapping[str, Any]) -> list[str]:
  """What holds for a whole run, a line each."""
  score, used = content["float"] or {}, content["versions"]
  protocol = {name: text for name, text in content["protocol"].items() if text}
  if score.get("top1") is not None:
    protocol["float"] = f"top-1 {score['top1']:.2%} of {score['count']} images"
  about = [f"{name}: {_plain(str(text))}" for name, text in protocol.items()]
  packages = ", ".join(f"{name} {version}" for name, version in used.items() if version)
  return [
    *(f"- {_plain(str(note))}" for note in content["notes"]),
    f"- Protocol: {'; '.join(about) or 'not stated'}.",
    f"- Measured on {_plain(content['machine'])} until {content['date']}; {content['seconds'] / 60:.1f} minutes of work "
    f"in the cells; {_plain(packages)}.",
    f"- Command: `{content['command']}`",
  ]


def _protocols(table: Table, results: Results) -> list[str]:
  """How every measured cell was measured, cells of equal words together."""
  cells: dict[str, list[str]] = {}
  for (row, column), entry in results.items():
    found = over_seeds(entry)
    if found is not None:
      seeds = f" (seed {', '.join(map(str, found.seeds))})" if entry.seeded else ""
      cells.setdefault(entry.protocol, []).append(f"{row}, {column}{seeds}")
  return [f"- {_plain('; '.join(names))}: {_plain(protocol)}." for protocol, names in cells.items()]


def _filled(text: str, study: str, stored: Sequence[Stored]) -> str:
  """Words with our numbers put in."""
  known = {report.name: report.content for report in stored}

  def number(match: re.Match[str]) -> str:
    name, row, column = (part.strip() for part in match.groups())
    for kept in known[name]["tables"] if name in known else ():
      table, results = results_store.as_table(kept)
      if over_seeds(results.get((row, column))) is not None:
        # The table says how many seeds there are; in a sentence "(1)" behind every number only disturbs.
        return _plain(cell_text(results[row, column], table.unit_of(column)).removesuffix(" (1)"))
    raise KwjaxError(
      f"{study}.md names {match.group(0)}, which was not measured; kept reports: {', '.join(known) or 'none'}"
    )

  return _REFERENCE.sub(number, text)


def _plain(text: str) -> str:
  """Text in which nothing is Markdown."""
  return re.sub(r"([\\*_|<>`\[\]])", r"\\\1", text).replace("\n", " ")


def main(args: Sequence[str] | None = None) -> int:
  """Command line of the page; returns the exit status."""
  options = parse(Options, args, "python -m experiments.results_page", __doc__)
  return run_command(lambda: run(options))


if __name__ == "__main__":
  sys.exit(main())
