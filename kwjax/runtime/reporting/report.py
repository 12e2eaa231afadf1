"""The report of a run: `report.json` for programs and one self-contained `report.html` for people."""

from __future__ import annotations

import math
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from kwjax.errors import KwjaxError
from kwjax.runtime.files import PathLike, atomic_write, write_json
from kwjax.runtime.reporting.html import render
from kwjax.runtime.reporting.parts import Picture as Picture
from kwjax.runtime.reporting.parts import Shown, ShownTile, tile_png
from kwjax.runtime.reporting.parts import Tile as Tile

# Keys that every report has, whatever the experiment; a mapping lists the keys inside.
_KEYS: dict[str, tuple[str, ...]] = {
  "network": (),
  "protocol": (),
  "seed": (),
  "float": ("top1", "count"),
  "jkl": ("start", "final", "per_layer"),
  "synthesis": ("images", "steps", "seconds", "images_per_minute"),
  "calibrated": (),
  "distilled": (),
  "agreement": (),
  "versions": (),
  "command": (),
}
_RESULT_KEYS = ("top1", "std", "seeds")
_PACKAGES = ("kwjax", "jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, Any]:
  """What the run ran on: Python, the packages that set numbers, system, device kind and number, CPU cores."""
  found: dict[str, Any] = {"python": platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      found[package] = None
  devices = jax.devices()
  return {
    **found,
    "platform": platform.platform(),
    "backend": devices[0].platform,
    "device": devices[0].device_kind,
    "devices": len(devices),
    "cpu_count": os.cpu_count(),
  }


def command_line() -> str:
  """The command that started this process, quoted for a shell; `-m MODULE` where a module was run."""
  spec = getattr(sys.modules.get("__main__"), "__spec__", None)
  start = ["python", "-m", spec.name.removesuffix(".__main__")] if spec is not None else ["python", sys.argv[0]]
  return shlex.join([*start, *sys.argv[1:]])


def complete(report: Mapping[str, Any]) -> dict[str, Any]:
  """A report with every fixed key, in the fixed order: null for what is missing, further keys after them as they are.

  Numbers that JSON cannot express (NaN, infinity) become null and are listed under `notes`. Dataclasses, named tuples
  and NumPy values become plain ones. `top1` and `top5` are fractions in [0, 1].

  Args:
    report: any of `network`, `protocol`, `seed`, `float` {top1, count}, `jkl` {start, final, per_layer}, `synthesis`
      {images, steps, seconds, images_per_minute}, `calibrated` and `distilled` {bits: {data: {top1, std, seeds}}},
      `agreement`, `versions`, `command`, and others, of which the page shows `reconstructed`, as `calibrated`, `notes`,
      `decisions` [{about, choice, reason}] and `classes` {counts {class: images}, effective, confidence, aimed}, as in
      `kwjax.analysis.class_balance`.

  Returns:
    A new mapping that `json.dumps(allow_nan=False)` accepts.

  Raises:
    KwjaxError: a fixed key that holds a mapping holds something else, or an accuracy is not in [0, 1].
  """
  notes: list[str] = []
  plain = _plain(dict(report), "", notes)
  full: dict[str, Any] = {key: plain.pop(key, None) for key in _KEYS}
  for key, inner in _KEYS.items():
    if inner and full[key] is not None:
      full[key] = _with_keys(full[key], inner, key)
  for key, tree in (("calibrated", full), ("reconstructed", plain), ("distilled", full)):
    for bits, row in _mapping(tree.get(key) or {}, key).items():
      for data, result in _mapping(row or {}, f"{key}.{bits}").items():
        if result is not None:
          tree[key][bits][data] = _with_keys(result, _RESULT_KEYS, f"{key}.{bits}.{data}")
  _check_fractions(full, "")
  earlier = plain.pop("notes", None)
  full.update(plain)
  all_notes = [*([earlier] if isinstance(earlier, str) else earlier or []), *notes]
  return {**full, "notes": all_notes} if all_notes else full


def write_report(
  report: Mapping[str, Any],
  workdir: PathLike,
  *,
  figures: Mapping[str, PathLike | Picture] | None = None,
  tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
  images: Sequence[Tile] = (),
  title: str | None = None,
) -> pathlib.Path:
  """Writes `report.json` and `report.html` in `workdir`.

  The page needs nothing else: style and pictures are inside it, it loads nothing and runs no script. What was not
  measured says so. Accuracies stand with Wilson's 95 % interval where the number of test images is known; an entry
  without its own `count` is taken to be measured on the images of `float`.

  Args:
    report: see `complete`.
    workdir: the folder; made where there is none.
    figures: title -> PNG file, or `Picture` with a caption and its place on the page, in the order in which they are shown.
    tables: title -> rows; a row maps column names to values, None meaning not measured.
    images: some of the images that were made, each with its label.
    title: heading of the page; by default from the network's name.

  Returns:
    The path of `report.html`.

  Raises:
    KwjaxError: as `complete`, a figure cannot be read or is not a PNG, an image is not [h,w,1 or 3], or the files cannot
      be written; jinja2 is not installed.
  """
  folder = pathlib.Path(workdir)
  full = complete(report)
  pictures = [_shown(name, found) for name, found in (figures or {}).items()]
  tiles = [ShownTile(tile_png(tile), tile.label, len(tile.image)) for tile in images]
  rows = _plain({name: list(table) for name, table in (tables or {}).items()}, "", [])
  page = render(full, pictures, rows, title or f"kwjax report: {network_name(full)}", tiles)
  write_json(folder / "report.json", full)
  return atomic_write(folder / "report.html", page.encode())


def network_name(report: Mapping[str, Any]) -> str:
  """The network of a report as text: the value itself, or its `name`."""
  network = report.get("network")
  name = network.get("name") if isinstance(network, Mapping) else network
  return "unnamed network" if name is None else str(name)


def _plain(value: Any, where: str, notes: list[str]) -> Any:
  if hasattr(value, "_asdict"):
    value = value._asdict()
  elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
    value = {name: getattr(value, name) for name in value.__dataclass_fields__}
  elif isinstance(value, os.PathLike):
    value = os.fspath(value)
  elif not isinstance(value, (str, bytes, list, tuple)) and hasattr(value, "__array__"):
    value = np.asarray(value).tolist()
  if isinstance(value, Mapping):
    return {str(key): _plain(item, f"{where}.{key}" if where else str(key), notes) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item, f"{where}[{i}]", notes) for i, item in enumerate(value)]
  if isinstance(value, float) and not math.isfinite(value):
    notes.append(f"{where} was {value}, which JSON cannot express, and is null here")
    return None
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise KwjaxError(f"report: {where} holds a {type(value).__name__}, which has no JSON form")


def _mapping(value: Any, where: str) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise KwjaxError(f"report: {where} must be a mapping, found {value!r}")
  return value


def _with_keys(value: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
  value = _mapping(value, where)
  return {**{key: value.get(key) for key in keys}, **value}


def _check_fractions(value: Any, where: str) -> None:
  if not isinstance(value, Mapping):
    return
  for key, item in value.items():
    if key in ("top1", "top5") and item is not None and not (isinstance(item, (int, float)) and 0 <= item <= 1):
      raise KwjaxError(f"report: {where}{key} must be a fraction in [0, 1], found {item!r}")
    _check_fractions(item, f"{where}{key}.")


def _shown(name: str, found: PathLike | Picture) -> Shown:
  picture = found if isinstance(found, Picture) else Picture(found)
  return Shown(name, _png(picture.path), picture.caption, picture.section)


def _png(path: PathLike) -> bytes:
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise KwjaxError(f"report: cannot read the figure {path}: {error.strerror}") from error
  if not data.startswith(b"\x89PNG\r\n\x1a\n"):
    raise KwjaxError(f"report: the figure {path} is not a PNG")
  return data
