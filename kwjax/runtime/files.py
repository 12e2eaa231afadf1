"""Files that are whole or absent, their checksums, and the settings of a stored result."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from kwjax.errors import CheckpointError, KwjaxError

PathLike = str | os.PathLike[str]

SEAL = "sha256"
"""Key of the checksum of the other keys in a JSON file."""


def atomic_write(path: PathLike, data: bytes) -> pathlib.Path:
  """Write `data` to `path`. A reader, or a crash at any time, sees the old file or the new one, never a part.

  The bytes go to a temporary file in the same folder, are flushed to the disk, and are then renamed over `path`.

  Args:
    path: of the file; missing parent folders are made.
    data: the whole content.

  Returns:
    `path` as a `pathlib.Path`.

  Raises:
    KwjaxError: the disk is full or the folder cannot be written. An earlier file at `path` is unchanged.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise KwjaxError(
      f"cannot write {path} ({len(data):,} bytes): {error.strerror or error}; an earlier file is unchanged"
    ) from error
  return path


def sha256_file(path: PathLike) -> str:
  """SHA-256 of a file's content, 64 hexadecimal digits. It is read in blocks, so it can be larger than memory.

  Raises:
    OSError: the file cannot be read.
  """
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
  """The canonical JSON text of `value`: sorted keys, no spaces; tuples as lists, NumPy scalars as numbers, paths as text.

  Raises:
    TypeError: a value has no JSON form.
  """
  return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)


def write_json(path: PathLike, value: Any) -> pathlib.Path:
  """Write `value` as strict, indented JSON with `atomic_write`.

  Args:
    path: the file to write.
    value: mappings, sequences, text, booleans, None and finite numbers; NumPy scalars and arrays and paths too.

  Raises:
    KwjaxError: the file cannot be written.
    ValueError: a number is NaN or infinite, which JSON cannot express.
    TypeError: a value has no JSON form.
  """
  text = json.dumps(value, indent=2, allow_nan=False, default=_plain, ensure_ascii=False)
  return atomic_write(path, (text + "\n").encode())


def read_json(path: PathLike) -> Any:
  """Read a JSON file.

  Raises:
    CheckpointError: the file is missing, unreadable or is not JSON.
  """
  try:
    return json.loads(pathlib.Path(path).read_bytes())
  except OSError as error:
    raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
  except ValueError as error:
    raise CheckpointError(f"{path} is not valid JSON, so it is damaged: {error}") from error


def write_sealed_json(path: PathLike, content: Mapping[str, Any]) -> pathlib.Path:
  """Write a mapping like `write_json`, with the key `sha256` added, which `read_sealed_json` checks.

  sha256 = SHA-256 of `canonical_json(content)`, so white space and the order of keys do not matter.

  Args:
    path: the file to write.
    content: as in `write_json`, with text as keys and without the key `sha256`.

  Raises:
    KwjaxError: the file cannot be written.
    ValueError: a number is NaN or infinite.
    TypeError: a value has no JSON form.
  """
  return write_json(path, {**content, SEAL: seal(content)})


def read_sealed_json(path: PathLike) -> dict[str, Any]:
  """The content that `write_sealed_json` wrote, without its checksum.

  Raises:
    CheckpointError: the file is missing or unreadable, is not a JSON mapping, or does not match its checksum.
  """
  content = read_json(path)
  if not isinstance(content, dict) or content.pop(SEAL, None) != seal(content):
    raise CheckpointError(f"{path} is damaged or was edited: its content does not have the checksum it states")
  return content


def seal(content: Mapping[str, Any]) -> str:
  """SHA-256 of the canonical JSON of a mapping, the same after a round trip through a file."""
  return hashlib.sha256(canonical_json(json.loads(canonical_json(content))).encode()).hexdigest()


def settings_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
  """The settings in which two runs differ, with both values.

  Args:
    stored: settings found in a file; nested mappings are compared key by key.
    current: settings of this run, any value for `canonical_json`.

  Returns:
    One text for each difference, such as `objective.beta is 0.001 there and 0.01 now`; empty if they agree.
  """
  there, now = _flat(json.loads(canonical_json(stored))), _flat(json.loads(canonical_json(current)))
  return [
    f"{key} is {there.get(key, 'absent')} there and {now.get(key, 'absent')} now"
    for key in sorted(there.keys() | now.keys())
    if there.get(key) != now.get(key)
  ]


def check_settings(where: PathLike, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
  """Raise `CheckpointError` with `where` and every differing setting, unless the settings agree."""
  differences = settings_differences(stored, current)
  if differences:
    raise CheckpointError(
      f"{where} was made with other settings: {'; '.join(differences)}; use those settings or another folder"
    )


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
  """Nested mappings as one mapping from dotted keys to JSON text. NaN equals NaN; an empty mapping is a value."""
  if not isinstance(value, Mapping) or (not value and prefix):
    return {prefix: canonical_json(value)}
  flat: dict[str, str] = {}
  for key, item in value.items():
    flat.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
  return flat


def _plain(value: Any) -> Any:
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if hasattr(value, "__array__"):
    return np.asarray(value).tolist()
  raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def _sync_folder(folder: pathlib.Path) -> None:
  """Make a rename survive a power cut, if the file system can flush a folder. A crash alone does not need it."""
  with contextlib.suppress(OSError):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
