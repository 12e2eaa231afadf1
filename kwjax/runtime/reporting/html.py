"""The report as one HTML page: results first, then how they came about; `templates/` holds the page itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kwjax.analysis.class_balance import images_by_count
from kwjax.optional import require
from kwjax.runtime.evaluate import wilson_interval
from kwjax.runtime.reporting import parts as report_parts
from kwjax.runtime.reporting.parts import Shown, ShownTile, number, percent

_LISTED_CLASSES = 40
_SETS = {"held_out": "held-out", "eval": "evaluation"}
_OWN = ("accuracy", "jkl")
_FILTERS = ("anchor", "columns", "data_url", "number", "thousands")

_STAGES = ("calibrated", "reconstructed", "distilled")


class _Section(NamedTuple):
  """A part of the page: heading, the macro of `templates/sections.html` that shows it, what it shows, name in the links."""

  name: str
  macro: str
  data: Any
  short: str = ""
  is_expected: bool = True  # named among what was not measured if it is absent


def render(
  report: Mapping[str, Any],
  figures: Sequence[Shown],
  tables: Mapping[str, Sequence[Mapping[str, Any]]],
  title: str,
  images: Sequence[ShownTile] = (),
) -> str:
  """The whole page.

  Args:
    report: as `kwjax.runtime.reporting.report.complete` returns it.
    figures: pictures, in the order in which they are shown.
    tables: title -> rows of column name -> value.
    title: heading of the page.
    images: some of the images that were made.

  Returns:
    HTML text with everything inside.

  Raises:
    KwjaxError: jinja2 is not installed.
  """
  jinja2 = require("jinja2", extra="report", purpose="the report")
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("kwjax.runtime.reporting"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {name: getattr(report_parts, name) for name in _FILTERS}
  environment.filters["json"] = report_parts.compact_json
  sections = _sections(report, figures, tables, title, images)
  page = environment.get_template("report.html")
  return str(page.render(title=title, summary=summary(report, tables), sections=sections))


def _sections(
  report: Mapping[str, Any],
  figures: Sequence[Shown],
  tables: Mapping[str, Sequence[Mapping[str, Any]]],
  title: str,
  images: Sequence[ShownTile],
) -> list[_Section]:
  own = {name: [shown for shown in figures if shown.section == name] for name in _OWN}
  others = [shown for shown in figures if shown.section not in _OWN]
  command = report["command"]
  candidates = [
    # The heading of the page need not stand above its only table once more.
    *(_Section("Table" if name == title else name, "table", list(rows)) for name, rows in tables.items()),
    _Section("Accuracy", "accuracy", {"rows": _results(report), "figures": own["accuracy"]}),
    _Section("Agreement with the float network", "agreement", _agreement(report), "Agreement"),
    _Section("Notes", "notes", report.get("notes"), is_expected=False),
    _Section("What was decided, and why", "pairs", _decisions(report), "Decisions", is_expected=False),
    _Section("Images", "gallery", _images(report, images), is_expected=False),
    _Section("Classes of the images", "classes", _classes(report), "Classes", is_expected=False),
    _Section("Similarity to the training data (J_KL)", "similarity", _similarity(report, own["jkl"]), "Similarity"),
    _Section("Figures", "figures", others, is_expected=False),
    _Section("Cost of the synthesis", "pairs", report["synthesis"], "Cost"),
    _Section("Protocol", "pairs", {"seed": report["seed"], **_as_mapping(report["protocol"])}),
    _Section("Command", "command", command),
    _Section("Versions", "pairs", _as_mapping(report["versions"])),
  ]
  named = {section.name for section in candidates[: len(tables)]}
  present = [section for section in candidates if section.data or section.name in named or section.data == ""]
  absent = [section.name for section in candidates if section not in present and section.is_expected]
  return [*present, _Section("Not measured", "absent", absent)] if absent else present


def summary(report: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> str:
  """The run in one sentence, made of what was measured and of nothing else; at least what its tables are."""
  parts = []
  floating = report["float"] or {}
  if floating.get("top1") is not None:
    count = f" on {floating['count']:,} images" if floating.get("count") else ""
    parts.append(f"the float network has {percent(floating['top1'])} top-1{count}")
  for stage in _STAGES:
    last = [
      (bits, data, result["top1"]) for bits, data, result in _leaves(report.get(stage)) if result["top1"] is not None
    ]
    if last:
      bits = last[-1][0]
      data, best = max(((d, v) for b, d, v in last if b == bits), key=lambda item: item[1])
      parts.append(f"{bits} {stage} with {data} images has {percent(best)}")
  if floating.get("top1") is None and (agreeing := _held_out_agreement(report["agreement"])):
    parts.append(f"the quantized networks agree with the float network on held-out images: {', '.join(agreeing)}")
  jkl = report["jkl"] or {}
  if jkl.get("start") is not None and jkl.get("final") is not None:
    shown = f"from {number(jkl['start'])} to {number(jkl['final'])}"
    if jkl.get("start_trimmed") is not None and jkl.get("final_trimmed") is not None:
      without = f"from {number(jkl['start_trimmed'])} to {number(jkl['final_trimmed'])}"
      shown = f"{without} without outliers ({shown} with them)"
    parts.append(f"J_KL of the synthesised images went {shown}")
  synthesis = report["synthesis"] or {}
  if synthesis.get("images") is not None:
    seconds = f" in {number(synthesis['seconds'])} s" if synthesis.get("seconds") is not None else ""
    parts.append(f"{synthesis['images']:,} images were made{seconds}")
  if not parts:
    parts = [title for title, found in (tables or {}).items() if any(_holds_a_number(row) for row in found)]
  if not parts:
    return "Nothing was measured."
  sentence = "; ".join(parts) + "."
  return sentence[0].upper() + sentence[1:]


def _holds_a_number(row: Mapping[str, Any]) -> bool:
  """Whether something was measured in a row of a table, whose first column names it; a paper's number alone is not."""
  return any(value is not None and not str(value).startswith("not measured") for value in list(row.values())[1:])


def _held_out_agreement(tree: Any) -> list[str]:
  """`8w8a 97.50 %` of each quantized network, with its first set of images, where there is such a number."""
  found = []
  for bits, row in (tree or {}).items() if isinstance(tree, Mapping) else ():
    sets = next(iter(row.values()), None) if isinstance(row, Mapping) else None
    held_out = sets.get("held_out") if isinstance(sets, Mapping) else None
    if isinstance(held_out, Mapping) and held_out.get("top1") is not None:
      found.append(f"{bits} {percent(held_out['top1'])}")
  return found


def _results(report: Mapping[str, Any]) -> list[dict[str, Any]]:
  """A row a network; none without labelled images."""
  floating = _as_mapping(report["float"])
  count = floating.get("count")
  found = [_result_row("float", "", floating, count)]
  for stage in _STAGES:
    leaves = list(_leaves(report.get(stage)))
    found += [_result_row(f"{bits}, {stage}", data, result, count) for bits, data, result in leaves]
    if not leaves and stage in report:
      found.append({"network": stage, "data": "", "top-1": None, "95 % interval": "", "std": "", "seeds": ""})
  return [] if all(row["top-1"] is None for row in found) else found


def _decisions(report: Mapping[str, Any]) -> dict[str, str]:
  """What was done and why, by what it is about."""
  return {row["about"]: f"{row['choice']} {row['reason']}" for row in report.get("decisions") or ()}


def _result_row(network: str, data: str, result: Mapping[str, Any], count: int | None) -> dict[str, Any]:
  top1, trials = result.get("top1"), result.get("count") or count
  std, seeds = result.get("std"), result.get("seeds")
  return {
    "network": network,
    "data": data,
    "top-1": None if top1 is None else percent(top1),
    "95 % interval": "" if top1 is None else _interval(top1, trials) or "number of images unknown",
    "std": "" if std is None else f"{100 * std:.2f} points",
    "seeds": "" if seeds is None else len(seeds) if isinstance(seeds, list) else seeds,
  }


def _interval(fraction: float, trials: int | None) -> str:
  if not trials:
    return ""
  return "{:.1f} to {:.1f} %".format(*(100 * end for end in wilson_interval(fraction * trials, trials)))


def _leaves(tree: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
  """(bits, data, result) of the results that there are."""
  for bits, row in (tree or {}).items():
    for data, result in (row or {}).items():
      if result is not None:
        yield bits, data, result


def _agreement(report: Mapping[str, Any]) -> list[dict[str, Any]]:
  tree = report["agreement"]

  def walk(value: Any, path: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    names = dict(zip(("network", "data", "on"), (*path[:2], ", ".join(_SETS.get(p, p) for p in path[2:]), "", "")))
    if not isinstance(value, Mapping):
      yield {**names, "value": value}
    elif "top1" in value:
      where, top1 = ".".join(("agreement", *path)), value["top1"]
      yield {
        **names,
        "same top-1": None if top1 is None else percent(top1),
        "95 % interval": "" if top1 is None else _interval(top1, value.get("count")),
        "KL (nats)": _finite(report, f"{where}.kl", value.get("kl")),
        "SQNR (dB)": _finite(report, f"{where}.sqnr_db", value.get("sqnr_db")),
        "images": value.get("count"),
      }
    else:
      for key, item in value.items():
        yield from walk(item, (*path, str(key)))

  return list(walk(tree, ())) if tree else []


def _finite(report: Mapping[str, Any], where: str, value: Any) -> Any:
  """The value; a null that stands for NaN or infinity was measured, so the page must not say otherwise."""
  prefix = f"{where} was "
  notes = [note for note in report.get("notes", ()) if note.startswith(prefix)]
  return notes[0].removeprefix(prefix).partition(",")[0] if value is None and notes else value


def _images(report: Mapping[str, Any], images: Sequence[ShownTile]) -> dict[str, Any]:
  if not images:
    return {}
  made = (report["synthesis"] or {}).get("images")
  large = any(image.height > 64 for image in images)
  return {"images": images, "made": made if isinstance(made, int) else None, "large": large}


def _classes(report: Mapping[str, Any]) -> dict[str, Any]:
  """Counts per class; of very many classes the most frequent ones and how many have none, one, two, ... images."""
  found = report.get("classes")
  if not isinstance(found, Mapping) or not isinstance(found.get("counts"), Mapping) or not found["counts"]:
    return {}
  counts: Mapping[str, int] = found["counts"]
  images, seen = sum(counts.values()), sum(count > 0 for count in counts.values())
  says = [f"The float network puts the {images:,} images into {seen:,} of its {len(counts):,} classes"]
  if found.get("effective") is not None:
    says.append(f"as evenly as {found['effective']:.1f} equally frequent classes would be")
  if found.get("confidence") is not None:
    says.append(f"with a mean probability of {percent(found['confidence'])} for its answer")
  if found.get("aimed") is not None:
    says.append(f"{percent(found['aimed'])} of them are what they were made to be")
  data = {"sentence": f"{', '.join(says)}.", "all": counts if len(counts) <= _LISTED_CLASSES else {}}
  most = dict(sorted(counts.items(), key=lambda item: -item[1])[:10])
  return {**data, "most": most, "by_count": images_by_count(counts)}


def _similarity(report: Mapping[str, Any], figures: Sequence[Shown]) -> dict[str, Any]:
  values = _as_mapping(report["jkl"])
  if not values:
    return {"shown": {}, "sets": [], "figures": figures} if figures else {}
  layers = values.get("per_layer")
  shown = {key: _finite(report, f"jkl.{key}", values.get(key)) for key in ("start", "final")}
  if isinstance(layers, Mapping):
    numbers = {name: value for name, value in layers.items() if isinstance(value, (int, float))}
    worst = sorted(numbers, key=lambda name: -numbers[name])[:5]
    shown |= {f"worst layer: {name}" if i == 0 else name: numbers[name] for i, name in enumerate(worst)}
  sets = values.get("sets")
  entries = sets.items() if isinstance(sets, Mapping) else ()
  compared = [_similarity_row(name, entry) for name, entry in entries if isinstance(entry, Mapping)]
  return {"shown": shown, "sets": compared, "figures": figures}


def _similarity_row(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
  row = {"images": name, "J_KL (nats)": entry.get("jkl"), "without input": entry.get("without_input")}
  if entry.get("outliers") is None:
    return row
  outliers = f"{entry['outliers']:,} of {entry['channels']:,}"
  column = f"outliers (channels above {number(entry['outlier_nats'])} nats)"
  return {**row, "without outliers": entry["trimmed"], column: outliers}


def _as_mapping(value: Any) -> dict[str, Any]:
  if value is None:
    return {}
  return dict(value) if isinstance(value, Mapping) else {"value": value}
