"""The report as one HTML page; every text that comes from a run is escaped."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kwjax.runtime.evaluate import wilson_interval

_MISSING = "not measured"
_STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --soft: #f3f5f7; --dim: #5d6670; --ink: #16191d; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4048; --soft: #1e2227; --dim: #9aa4af; --ink: #e6e9ec; --page: #121417 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page) }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.summary { font-size: 1.1rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
.wide th, .wide td { white-space: nowrap }
.pairs td { overflow-wrap: anywhere }
thead th { color: var(--dim); font-weight: 600 }
tbody th { font-weight: 500 }
.missing { color: var(--dim); font-style: italic }
figure { margin: 1rem 0 }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px }
figcaption { color: var(--dim); font-size: .9rem }
pre { background: var(--soft); padding: .7rem; border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere }
"""


def render(
  report: Mapping[str, Any],
  figures: Mapping[str, bytes],
  tables: Mapping[str, Sequence[Mapping[str, Any]]],
  title: str,
) -> str:
  """The whole page.

  Args:
    report: as `kwjax.runtime.report.complete` returns it.
    figures: title -> PNG bytes.
    tables: title -> rows of column name -> value.
    title: heading of the page.

  Returns:
    HTML text with everything inside.
  """
  sections = [
    f'<h1>{_text(title)}</h1>\n<p class="summary">{_text(summary(report))}</p>',
    *(_section(name, _rows(rows)) for name, rows in tables.items()),
    _section("Protocol", _pairs({"seed": report["seed"], **_as_mapping(report["protocol"])})),
    _section("Accuracy", _results(report)),
    _section("Agreement with the float network", _agreement(report)),
    _section("Similarity to the training data (J_KL, nats)", _jkl(report)),
    _figures(figures),
    _section("Cost of the synthesis", _pairs(_as_mapping(report["synthesis"]))),
    _section("Versions", _pairs(_as_mapping(report["versions"]))),
    _section("Command", _command(report["command"])),
  ]
  if report.get("notes"):
    sections.append(
      _section("Notes", "<ul>" + "".join(f"<li>{_text(note)}</li>" for note in report["notes"]) + "</ul>")
    )
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    + "\n".join(section for section in sections if section)
    + "\n</body>\n</html>\n"
  )


def summary(report: Mapping[str, Any]) -> str:
  """The run in one sentence, made of what was measured and of nothing else."""
  parts = []
  floating = report["float"] or {}
  if floating.get("top1") is not None:
    count = f" on {floating['count']:,} images" if floating.get("count") else ""
    parts.append(f"the float network has {_percent(floating['top1'])} top-1{count}")
  for stage in ("calibrated", "distilled"):
    last = [(bits, data, result["top1"]) for bits, data, result in _leaves(report[stage]) if result["top1"] is not None]
    if last:
      bits = last[-1][0]
      data, best = max(((d, v) for b, d, v in last if b == bits), key=lambda item: item[1])
      parts.append(f"{bits} {stage} with {data} images has {_percent(best)}")
  if floating.get("top1") is None and (agreeing := _held_out_agreement(report["agreement"])):
    parts.append(f"the copies agree with the float network on held-out images: {', '.join(agreeing)}")
  jkl = report["jkl"] or {}
  if jkl.get("start") is not None and jkl.get("final") is not None:
    parts.append(f"J_KL of the synthesised images went from {_number(jkl['start'])} to {_number(jkl['final'])}")
  synthesis = report["synthesis"] or {}
  if synthesis.get("images") is not None:
    seconds = f" in {_number(synthesis['seconds'])} s" if synthesis.get("seconds") is not None else ""
    parts.append(f"{synthesis['images']:,} images were made{seconds}")
  if not parts:
    return "Nothing was measured."
  text = "; ".join(parts) + "."
  return text[0].upper() + text[1:]


def _held_out_agreement(tree: Any) -> list[str]:
  """`8w8a 97.50 %` of each copy, with its first set of images, where there is such a number."""
  found = []
  for copy, row in (tree or {}).items() if isinstance(tree, Mapping) else ():
    sets = next(iter(row.values()), None) if isinstance(row, Mapping) else None
    held_out = sets.get("held_out") if isinstance(sets, Mapping) else None
    if isinstance(held_out, Mapping) and held_out.get("top1") is not None:
      found.append(f"{copy} {_percent(held_out['top1'])}")
  return found


def _results(report: Mapping[str, Any]) -> str:
  floating = _as_mapping(report["float"])
  count = floating.get("count")
  rows = [_result_row("float", "", floating, count)]
  for stage in ("calibrated", "distilled"):
    leaves = list(_leaves(report[stage]))
    rows += [_result_row(f"{bits}, {stage}", data, result, count) for bits, data, result in leaves]
    if not leaves:
      rows.append({"network": stage, "data": "", "top-1": None, "95 % interval": "", "std": "", "seeds": ""})
  return _rows(rows)


def _result_row(network: str, data: str, result: Mapping[str, Any], count: int | None) -> dict[str, Any]:
  top1, trials = result.get("top1"), result.get("count") or count
  interval = None
  if top1 is not None and trials:
    interval = "{:.1f} to {:.1f} %".format(*(100 * end for end in wilson_interval(top1 * trials, trials)))
  std, seeds = result.get("std"), result.get("seeds")
  return {
    "network": network,
    "data": data,
    "top-1": None if top1 is None else _percent(top1),
    "95 % interval": interval or ("" if top1 is None else "number of images unknown"),
    "std": "" if std is None else f"{100 * std:.2f} points",
    "seeds": "" if seeds is None else len(seeds) if isinstance(seeds, list) else seeds,
  }


def _leaves(tree: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
  """(bits, data, result) of the results that there are."""
  for bits, row in (tree or {}).items():
    for data, result in (row or {}).items():
      if result is not None:
        yield bits, data, result


def _agreement(report: Mapping[str, Any]) -> str:
  tree = report["agreement"]

  def walk(value: Any, path: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    if not isinstance(value, Mapping):
      yield {"network": ", ".join(path), "value": value}
    elif "top1" in value:
      where = ".".join(("agreement", *path))
      yield {
        "network": ", ".join(path),
        "same top-1": None if value["top1"] is None else _percent(value["top1"]),
        "KL (nats)": _finite(report, f"{where}.kl", value.get("kl")),
        "SQNR (dB)": _finite(report, f"{where}.sqnr_db", value.get("sqnr_db")),
        "images": value.get("count"),
      }
    else:
      for key, item in value.items():
        yield from walk(item, (*path, key))

  return _rows(list(walk(tree, ()))) if tree else _text(None)


def _finite(report: Mapping[str, Any], where: str, value: Any) -> Any:
  """The value; a null that stands for NaN or infinity was measured, so the page must not say otherwise."""
  prefix = f"{where} was "
  notes = [note for note in report.get("notes", ()) if note.startswith(prefix)]
  return notes[0].removeprefix(prefix).partition(",")[0] if value is None and notes else value


def _jkl(report: Mapping[str, Any]) -> str:
  values = _as_mapping(report["jkl"])
  layers = values.get("per_layer")
  pairs = {key: _finite(report, f"jkl.{key}", values.get(key)) for key in ("start", "final")}
  if isinstance(layers, Mapping):
    numbers = {name: value for name, value in layers.items() if isinstance(value, (int, float))}
    worst = sorted(numbers, key=lambda name: -numbers[name])[:5]
    pairs |= {f"worst layer: {name}" if i == 0 else name: numbers[name] for i, name in enumerate(worst)}
  return _pairs(pairs)


def _figures(figures: Mapping[str, bytes]) -> str:
  parts = []
  for name, data in figures.items():
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    parts.append(f'<figure><img alt="{_text(name)}" src="{source}"><figcaption>{_text(name)}</figcaption></figure>')
  return _section("Figures", "\n".join(parts)) if parts else ""


def _command(command: Any) -> str:
  return f"<pre>{_text(command)}</pre>" if command is not None else _text(None)


def _as_mapping(value: Any) -> dict[str, Any]:
  if value is None:
    return {}
  return dict(value) if isinstance(value, Mapping) else {"value": value}


def _section(name: str, body: str) -> str:
  return f"<h2>{_text(name)}</h2>\n{body}"


def _pairs(values: Mapping[str, Any]) -> str:
  if not values:
    return f"<p>{_text(None)}</p>"
  rows = "".join(f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>\n" for key, value in values.items())
  return f'<div class="scroll"><table class="pairs"><tbody>\n{rows}</tbody></table></div>'


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
  if not rows:
    return f"<p>{_text(None)}</p>"
  columns = list(dict.fromkeys(column for row in rows for column in row))
  head = "".join(f"<th>{_text(column)}</th>" for column in columns)
  body = "".join(
    "<tr>" + "".join(f"<td>{_text(row.get(column))}</td>" for column in columns) + "</tr>\n" for row in rows
  )
  return f'<div class="scroll"><table class="wide"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _text(value: Any) -> str:
  """A value as HTML."""
  if value is None:
    return f'<span class="missing">{_MISSING}</span>'
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, float):
    return _number(value)
  if isinstance(value, (Mapping, list)):
    return html.escape(json.dumps(value, ensure_ascii=False))
  return html.escape(str(value))


def _number(value: float) -> str:
  return f"{value:.4g}"


def _percent(fraction: float) -> str:
  return f"{100 * fraction:.2f} %"
