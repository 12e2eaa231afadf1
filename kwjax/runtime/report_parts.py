"""What a report page is made of: style, tables, figures, images; every text that comes from a run is escaped."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kwjax.errors import KwjaxError

MISSING = "not measured"
# The browser itself then refuses whatever is not inside the page: no request, no script.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --soft: #f3f5f7; --dim: #5d6670; --ink: #16191d; --page: #fff;
  --bar: #0072b2; --link: #005a8d; --shade: rgb(0 0 0 / .22) }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4048; --soft: #1e2227; --dim: #9aa4af; --ink: #e6e9ec; --page: #121417; --bar: #4aa3d8;
    --link: #7cc0ea; --shade: rgb(255 255 255 / .25) }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page) }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere }
p, li { overflow-wrap: anywhere }
.summary { font-size: 1.1rem }
nav { display: flex; flex-wrap: wrap; gap: 0 1.2rem; border-bottom: 1px solid var(--line) }
nav a { display: inline-block; padding: .65rem 0; color: var(--link); overflow-wrap: anywhere; min-width: 2.75rem }
/* A shade at the edge behind which a table goes on; it moves away with the content. */
.scroll { overflow-x: auto; background:
  linear-gradient(90deg, var(--page) 40%, transparent) left / 2.5rem 100% no-repeat local,
  linear-gradient(270deg, var(--page) 40%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(90deg, var(--shade), transparent) left / .8rem 100% no-repeat scroll,
  linear-gradient(270deg, var(--shade), transparent) right / .8rem 100% no-repeat scroll }
.scroll + .scroll { margin-top: 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
.wide th, .wide td { white-space: nowrap }
.pairs td { overflow-wrap: anywhere }
thead th { color: var(--dim); font-weight: 600 }
tbody th { font-weight: 500 }
.missing { color: var(--dim); font-style: italic }
.dim { color: var(--dim); font-size: .9rem }
figure { margin: 1rem 0 }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px }
figcaption { color: var(--dim); font-size: .9rem; overflow-wrap: anywhere }
figcaption b { color: var(--ink); font-weight: 600 }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)); gap: .6rem; padding: 0;
  list-style: none }
.large { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)) }
.gallery figure { margin: 0 }
.gallery figcaption { font-size: .8rem; line-height: 1.3 }
.gallery img { display: block; width: 100%; image-rendering: pixelated }
.large img { image-rendering: auto }
.bars { width: 100%; max-width: 34rem }
.bars td:last-child { width: 65%; padding-right: 0 }
.bars i { display: block; height: 1rem; margin-top: .2rem; background: var(--bar); border-radius: 2px }
@media (max-width: 30rem) {
  th, td { padding-right: .55rem }
  .wide td:first-child, .wide th:first-child { white-space: normal }
}
pre { background: var(--soft); padding: .7rem; border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere }
"""


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
  """A picture as the page holds it: PNG bytes with its words."""

  png: bytes
  caption: str
  section: str


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


def gallery(images: Sequence[tuple[bytes, str, int]]) -> str:
  """Images side by side, as many a row as there is room for; each is (PNG, label, height in pixels)."""
  large = any(height > 64 for *_, height in images)
  items = []
  for number, (png, label, _) in enumerate(images, 1):
    alt = f"image {number}: {label}" if label else f"image {number}"
    caption = f"<figcaption>{text(label)}</figcaption>" if label else ""
    items.append(f'<li><figure><img alt="{text(alt)}" src="{data_url(png)}">{caption}</figure></li>')
  return f'<ul class="gallery{" large" if large else ""}">\n' + "\n".join(items) + "\n</ul>"


def figure(name: str, shown: Shown) -> str:
  """A picture with its name and caption; the caption is also what a screen reader says."""
  caption = f"<b>{text(name)}.</b> {text(shown.caption)}" if shown.caption else text(name)
  alt = f"{name}. {shown.caption}" if shown.caption else name
  source = data_url(shown.png)
  return f'<figure><img alt="{text(alt)}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def data_url(png: bytes) -> str:
  """A PNG inside an attribute."""
  return "data:image/png;base64," + base64.b64encode(png).decode()


def section(name: str, body: str) -> str:
  """A part of the page under a heading that the list at its top links to."""
  return f'<h2 id="{anchor(name)}">{text(name)}</h2>\n{body}'


def anchor(name: str) -> str:
  """Name of a section in a link."""
  return "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower()).strip("-") or "section"


def pairs(values: Mapping[str, Any]) -> str:
  """A table of names and values."""
  if not values:
    return f"<p>{text(None)}</p>"
  body = "".join(f"<tr><th scope='row'>{text(key)}</th><td>{text(value)}</td></tr>\n" for key, value in values.items())
  return _scrolling(f'<table class="pairs"><tbody>\n{body}</tbody></table>')


def rows(found: Sequence[Mapping[str, Any]]) -> str:
  """A table with a column a key; what is empty in every row is left out, None is said to be not measured."""
  if not found:
    return f"<p>{text(None)}</p>"
  columns = list(dict.fromkeys(column for row in found for column in row))
  columns = [column for column in columns if any(row.get(column) != "" for row in found)]
  head = "".join(f"<th scope='col'>{text(column)}</th>" for column in columns)
  body = "".join(
    "<tr>" + "".join(f"<td>{text(row.get(column))}</td>" for column in columns) + "</tr>\n" for row in found
  )
  return _scrolling(f'<table class="wide"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>')


def bars(counts: Mapping[str, float]) -> str:
  """A table of names and numbers of at least zero, with a bar as long as each number."""
  most = max(counts.values(), default=0) or 1
  body = "".join(
    f"<tr><th scope='row'>{text(name)}</th><td>{text(count)}</td>"
    f'<td><i style="width:{100 * count / most:.1f}%"></i></td></tr>\n'
    for name, count in counts.items()
  )
  return _scrolling(f'<table class="bars"><tbody>\n{body}</tbody></table>')


def _scrolling(table: str) -> str:
  # Focus, so that it can be scrolled with a keyboard too.
  return f'<div class="scroll" tabindex="0">{table}</div>'


def text(value: Any) -> str:
  """A value as HTML."""
  if value is None:
    return f'<span class="missing">{MISSING}</span>'
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, float):
    return number(value)
  if isinstance(value, (Mapping, list)):
    return html.escape(json.dumps(value, ensure_ascii=False))
  return html.escape(str(value))


def number(value: float) -> str:
  """Four significant digits."""
  return f"{value:.4g}"


def percent(fraction: float) -> str:
  """A fraction in [0, 1] as `93.41 %`."""
  return f"{100 * fraction:.2f} %"
