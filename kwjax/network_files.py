"""The files of a stored network, read and checked. `kwjax.network` builds a `Network` from them."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import safetensors
import safetensors.numpy

from kwjax.errors import WeightsError

WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "network.json"
FORMAT = 1

_REQUIRED = ("image_shape", "input_mean", "input_std")
_KNOWN = {"format", "name", "arch", "model_options", "call_options", "source", "output", "weights_sha256", *_REQUIRED}
_LARGEST_OPTION = 1000


def check_options(options: Mapping[str, Any], where: pathlib.Path) -> None:
  """Refuse model options out of any sensible range; a million blocks would be traced for hours.

  Raises:
    WeightsError: naming `where`, the option and its value.
  """
  flat: list[tuple[str, Any]] = []
  for name, value in options.items():
    flat += [(name, item) for item in value] if isinstance(value, list) else [(name, value)]
  for name, value in flat:
    if name != "num_classes" and isinstance(value, (int, float)) and not value <= _LARGEST_OPTION:
      raise WeightsError(f"{where}: model option {name} must be at most {_LARGEST_OPTION}, found {value}")
  classes = options.get("num_classes", 1)
  if type(classes) is not int:
    raise WeightsError(f"{where}: model option num_classes must be a whole number, found {classes!r}")


def read_description(folder: pathlib.Path) -> dict[str, Any]:
  """Content of `network.json` in a folder, without its checksum. A file written by hand needs none.

  Raises:
    WeightsError: the file is missing, damaged, of another format, or lacks a key.
  """
  from kwjax.runtime.files import SEAL, seal

  path = folder / DESCRIPTION_FILE
  try:
    description = json.loads(path.read_bytes())
  except FileNotFoundError as error:
    raise WeightsError(
      f"{folder} is not a kwjax network: it has no {DESCRIPTION_FILE} (make one with python -m weights_conversion)"
    ) from error
  except OSError as error:
    raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
  except (ValueError, RecursionError) as error:
    raise WeightsError(f"{path} cannot be read, it is not valid JSON: {error}") from error
  if not isinstance(description, dict) or description.get("format") != FORMAT:
    found = description.get("format") if isinstance(description, dict) else type(description).__name__
    raise WeightsError(f"{path} has format {str(found)[:80]}, this version reads format {FORMAT}")
  stated = description.pop(SEAL, None)
  # An unknown key can be a damaged one, such as the checksum's.
  strange, missing = sorted(description.keys() - _KNOWN), [key for key in _REQUIRED if key not in description]
  if strange or missing:
    raise WeightsError(f"{path} is damaged or of another version: unknown keys {strange}, missing keys {missing}")
  try:
    intact = stated is None or stated == seal(description)
  except RecursionError:
    intact = False
  if not intact:
    raise WeightsError(f"{path} is damaged or was edited: its content does not have the checksum it states")
  return description


def read_weights(path: pathlib.Path, sha256: str | None) -> dict[str, jax.Array]:
  """Arrays of a safetensors file by name. The bytes must have the given SHA-256, if there is one.

  Raises:
    WeightsError: the file is missing, damaged or not a safetensors file.
  """
  try:
    payload = path.read_bytes()
  except OSError as error:
    raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
  found = hashlib.sha256(payload).hexdigest()
  if sha256 is not None and found != sha256:
    raise WeightsError(f"{path} is damaged: expected sha256 {str(sha256)[:16]}, found {found[:16]}")
  try:
    arrays = safetensors.numpy.load(payload)
  # KeyError, TypeError, AttributeError: an element type that NumPy lacks.
  except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
    raise WeightsError(f"{path} is not a safetensors file: {str(error)[:200]}") from error
  return {name: jnp.asarray(value) for name, value in arrays.items()}
