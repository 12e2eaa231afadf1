"""What a report page is made of: pictures, images, and how numbers are written."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kwjax.errors import KwjaxError


class Picture(NamedTuple):
  """A figure of a report.

  Attributes:
    path: its PNG file.
    caption: what it shows and how to read it, in a sentence or two.
    section: of the page, "accuracy" or "jkl"; any other text: the figures at its end.
  """

  path: str | os.PathLike[str]
  caption: str = ""
  section: str = ""


class Tile(NamedTuple):
  """One image of a report.

  Attributes:
    image: [h,w,c], c 1 or 3; floats in [0, 1] (what lies outside is clipped) or uint8.
    label: a few words below it.
  """

  image: np.ndarray
  label: str = ""


class Shown(NamedTuple):
  """A picture as the page holds it: its name, PNG bytes and words."""

  name: str
  png: bytes
  caption: str
  section: str


class ShownTile(NamedTuple):
  """An image as the page holds it: PNG bytes, label and height in pixels."""

  png: bytes
  label: str
  height: int


def tile_png(tile: Tile) -> bytes:
  """The image of a tile as PNG.

  Raises:
    KwjaxError: it is not [h,w,1] or [h,w,3].
  """
  import PIL.Image

  pixels = np.asarray(tile.image)
  if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
    raise KwjaxError(f"report: an image must be [h,w,1] or [h,w,3], found {list(pixels.shape)}")
  if pixels.dtype != np.uint8:
    pixels = np.round(np.clip(np.nan_to_num(pixels.astype(np.float32)), 0, 1) * 255).astype(np.uint8)
  buffer = io.BytesIO()
  PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", optimize=True)
  return buffer.getvalue()


def data_url(png: bytes) -> str:
  """A PNG inside an attribute."""
  return "data:image/png;base64," + base64.b64encode(png).decode()


def anchor(name: str) -> str:
  """Name of a section in a link."""
  return "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower()).strip("-") or "section"


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Keys of all rows in order, without those that are empty in every row."""
  found = list(dict.fromkeys(column for row in rows for column in row))
  return [column for column in found if any(row.get(column) != "" for row in rows)]


def compact_json(value: Any) -> str:
  """JSON with the characters as they are."""
  return json.dumps(value, ensure_ascii=False)


def number(value: float) -> str:
  """Four significant digits."""
  return f"{value:.4g}"


def thousands(value: int) -> str:
  """An integer as `50,000`."""
  return f"{value:,}"


def percent(fraction: float) -> str:
  """A fraction in [0, 1] as `93.41 %`."""
  return f"{100 * fraction:.2f} %"
