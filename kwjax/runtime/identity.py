"""What tells a value or a data set from another, so that results on one are not taken for results on the other."""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any

import numpy as np

from kwjax.runtime.data import ImageData
from kwjax.runtime.files import canonical_json, sha256_file

_SAMPLED = 32


def digest(value: Any) -> str:
  """Twelve hexadecimal digits that stand for a JSON-able value in the name of a file."""
  return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def identity(data: ImageData) -> dict[str, Any]:
  """What tells one data set from another wherever it lies: number, shape, labels, some images, the file it is in."""
  chosen = np.linspace(0, len(data) - 1, min(_SAMPLED, len(data))).round().astype(int)
  found = hashlib.sha256(np.ascontiguousarray(data.read(chosen)).tobytes())
  if data.labels is not None:
    found.update(np.ascontiguousarray(data.labels).tobytes())
  path = pathlib.Path(data.name.removesuffix(":train").removesuffix(":test"))
  whole = sha256_file(path)[:16] if path.is_file() else None
  return {"count": len(data), "shape": data.image_shape, "sample": found.hexdigest()[:16], "file": whole}


def short_name(data: ImageData) -> str:
  """The name of a data set without the folders it lies in, which differ from machine to machine."""
  return pathlib.PurePath(data.name).name
