"""What the folder of a command's run is called, and what its results depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from typing import Any

from kwjax.cli.options import Options
from kwjax.errors import KwjaxError
from kwjax.network import Network, fingerprint
from kwjax.runtime.data.images import content_digest
from kwjax.runtime.files import canonical_json


def class_names(options: Options, network: Network) -> list[str] | None:
  """Names of the network's classes, from --class-names or from `class_names.txt` in the folder of --network; or None.

  Raises:
    KwjaxError: the file cannot be read, is not text, has an empty line, or not one line a class.
  """
  path = options.class_names
  if path is None:
    path = options.network / "class_names.txt" if options.network is not None else None
    if path is None or not path.is_file():
      return None
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except OSError as error:
    raise KwjaxError(f"--class-names: {path} cannot be read: {error.strerror or error}") from error
  except UnicodeDecodeError as error:
    raise KwjaxError(f"--class-names: {path} is not UTF-8 text") from error
  names = [line.strip() for line in lines]
  empty = [number for number, name in enumerate(names, 1) if not name]
  if len(names) != network.num_classes:
    raise KwjaxError(
      f"--class-names: {path} has {len(names)} lines, but {network.name} has {network.num_classes} classes: one name a line"
    )
  if empty:
    raise KwjaxError(f"--class-names: line {empty[0]} of {path} is empty: one name a line")
  return names


def run_folder(name: str, options: Options, network: Network) -> pathlib.Path:
  """--workdir, or a folder whose name derives from everything that changes the result.

  The same command therefore resumes its own run, and another command never meets it.
  """
  if options.workdir is not None:
    return options.workdir
  digest = hashlib.sha256(canonical_json(result_settings(options, network)).encode()).hexdigest()[:8]
  return pathlib.Path("runs") / f"{name}-{network.name}-{options.scheme}-seed{options.seed}-{digest}"


def result_settings(options: Options, network: Network) -> dict[str, Any]:
  """The options that the results depend on."""
  without_effect = {
    "workdir",
    "resume",
    "dry_run",
    "network",
    "weights",
    "devices",
    "coordinator",
    "num_processes",
    "process_id",
    "checkpoint_seconds",
    "checkpoint_steps",
    "class_names",
    "tensorboard",
  }
  settings = {k: v for k, v in dataclasses.asdict(options).items() if k not in without_effect}
  specs = {name: settings[name] for name in ("eval_data", "real_data")}
  data = {name: None if spec is None else content_digest(spec) for name, spec in specs.items()}
  return {**settings, "network": fingerprint(network), "data": data}
