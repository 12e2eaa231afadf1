"""A quantized network as a folder: float weights, rules, ranges and, if they exist, integer weights."""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from kwjax.errors import KwjaxError, RuleError, WeightsError
from kwjax.network import DESCRIPTION_FILE, WEIGHTS_FILE, load_network, save_network
from kwjax.quantization.grids import Clip, Spacing
from kwjax.quantization.integer import QTensor, representable_weights
from kwjax.quantization.ranges import Ranges
from kwjax.quantization.rules import QuantRules
from kwjax.quantization.weight_ranges import WeightClips, WeightGrids
from kwjax.quantization.wrap import QuantizedNetwork, quantize

QUANTIZATION_FILE = "quantization.json"
INTEGER_FILE = "integer.safetensors"
CLIPS_FILE = "weight_clips.safetensors"
GRIDS_FILE = "weight_grids.safetensors"
FORMAT = 1


def save_quantized(quantized: QuantizedNetwork, folder: str | pathlib.Path) -> None:
  """Write the float network, `quantization.json` and, for layers with integer levels, `integer.safetensors`.

  `quantization.json` is written last and holds the checksums of the others, so an interrupted save is detected. The
  integer file holds `LAYER/q` i8, `LAYER/scale` f32, `LAYER/zero` i32, with value = (q - zero) * scale. If weight ranges
  are clipped, `weight_clips.safetensors` holds the clipped shares, `LAYER/lo` and `LAYER/hi` f32. Grids that do not follow
  the weights are in `weight_grids.safetensors`, `LAYER/scale` and `LAYER/zero` f32.

  Raises:
    KwjaxError: the folder cannot be written.
  """
  from kwjax.runtime.files import atomic_write, sha256_file, write_json

  folder = pathlib.Path(folder)
  save_network(quantized.network, folder)
  integers = {
    f"{layer}/{field}": np.asarray(getattr(tensor, field))
    for layer, tensor in representable_weights(quantized).items()
    for field in QTensor._fields
  }
  content: dict[str, Any] = {
    "format": FORMAT,
    "rules": quantized.rules.to_json(),
    "description": quantized.rules.describe(),
    "ranges": quantized.ranges.to_json(),
    "weights_sha256": sha256_file(folder / WEIGHTS_FILE),
    "integer_sha256": None,
    "clips_sha256": None,
    "grids_sha256": None,
  }
  clips, grids = (
    {
      f"{layer}/{name}": np.asarray(value)
      for layer, found in by_layer.items()
      for name, value in found._asdict().items()
    }
    for by_layer in (quantized.clips, quantized.grids)
  )
  for file, key, arrays in (
    (INTEGER_FILE, "integer_sha256", integers),
    (CLIPS_FILE, "clips_sha256", clips),
    (GRIDS_FILE, "grids_sha256", grids),
  ):
    if arrays:
      payload = safetensors.numpy.save(arrays)
      content[key] = hashlib.sha256(payload).hexdigest()
      atomic_write(folder / file, payload)
    else:
      (folder / file).unlink(missing_ok=True)
  write_json(folder / QUANTIZATION_FILE, {**content, "sha256": _digest(content)})


def load_quantized(folder: str | pathlib.Path, *, module: nn.Module | None = None) -> QuantizedNetwork:
  """Read a network that `save_quantized` wrote; it gives the same logits.

  Args:
    folder: of `save_quantized`.
    module: the Flax module, if the architecture is not in `kwjax.models`.

  Raises:
    WeightsError: a file is missing, damaged or belongs to another network.
    KwjaxError: the architecture is unknown.
  """
  folder = pathlib.Path(folder)
  content = _read(folder)
  for file, digest in ((WEIGHTS_FILE, content["weights_sha256"]), (INTEGER_FILE, content["integer_sha256"])):
    if digest is not None:
      _check_digest(folder / file, digest)
  network = load_network(folder, module=module)
  clips = _clips(folder, content["clips_sha256"]) if content["clips_sha256"] else {}
  grids = _grids(folder, content["grids_sha256"]) if content["grids_sha256"] else {}
  try:
    rules = QuantRules.from_json(content["rules"])
    return quantize(network, rules, Ranges.from_json(content["ranges"]), clips=clips, grids=grids)
  except (RuleError, KwjaxError) as error:
    raise WeightsError(f"{folder / QUANTIZATION_FILE} does not fit {folder / DESCRIPTION_FILE}: {error}") from error


def load_integer_weights(folder: str | pathlib.Path) -> dict[str, QTensor]:
  """Integer weights that `save_quantized` wrote, `{layer: QTensor}`; layers without an int8 form are absent.

  Raises:
    WeightsError: a file is missing or damaged, or no layer has integer weights.
  """
  folder = pathlib.Path(folder)
  digest = _read(folder)["integer_sha256"]
  if digest is None:
    raise WeightsError(f"{folder} holds no integer weights: no layer's weight scheme has an int8 form")
  arrays = _arrays(folder / INTEGER_FILE, digest)
  return {layer: QTensor(*(found[field] for field in QTensor._fields)) for layer, found in arrays.items()}


def _clips(folder: pathlib.Path, digest: str) -> WeightClips:
  return {layer: Clip(found["lo"], found["hi"]) for layer, found in _arrays(folder / CLIPS_FILE, digest).items()}


def _grids(folder: pathlib.Path, digest: str) -> WeightGrids:
  return {
    layer: Spacing(found["scale"], found["zero"]) for layer, found in _arrays(folder / GRIDS_FILE, digest).items()
  }


def _arrays(path: pathlib.Path, digest: str) -> dict[str, dict[str, jnp.ndarray]]:
  """`{layer: {field: array}}` of a file with names LAYER/FIELD; sorted, as the order in safetensors varies."""
  try:
    arrays = safetensors.numpy.load(_check_digest(path, digest))
  except (safetensors.SafetensorError, ValueError) as error:
    raise WeightsError(f"{path} is not a safetensors file: {error}") from error
  found: dict[str, dict[str, jnp.ndarray]] = {}
  for name in sorted(arrays):
    layer, _, field = name.rpartition("/")
    found.setdefault(layer, {})[field] = jnp.asarray(arrays[name])
  return found


def _read(folder: pathlib.Path) -> dict[str, Any]:
  from kwjax.runtime.files import read_json

  path = folder / QUANTIZATION_FILE
  if not path.is_file():
    raise WeightsError(f"{folder} is not a quantized network: it has no {QUANTIZATION_FILE}")
  try:
    content = read_json(path)
  except (OSError, ValueError) as error:
    raise WeightsError(f"{path} cannot be read: {error}") from error
  if not isinstance(content, dict) or content.get("format") != FORMAT:
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    raise WeightsError(f"{path} has format {found}, this version reads format {FORMAT}")
  stored = content.pop("sha256", None)
  if stored != _digest(content):
    raise WeightsError(f"{path} is damaged or was edited: its content does not have the checksum it states")
  return content


def _digest(content: dict[str, Any]) -> str:
  from kwjax.runtime.files import canonical_json

  return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _check_digest(path: pathlib.Path, expected: str) -> bytes:
  try:
    payload = path.read_bytes()
  except OSError as error:
    raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
  found = hashlib.sha256(payload).hexdigest()
  if found != expected:
    raise WeightsError(f"{path} is damaged or of another network: expected sha256 {expected[:16]}, found {found[:16]}")
  return payload
