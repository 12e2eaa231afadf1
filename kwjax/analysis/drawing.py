"""Shared parts of all figures: colours, plain axes, and a PNG that is bit-identical for the same data."""

from __future__ import annotations

import pathlib

from kwjax.errors import KwjaxError
from kwjax.optional import require
from kwjax.runtime.files import PathLike

# All modules of figures have matplotlib from here, so that its absence is told in one sentence.
require("matplotlib", extra="report", purpose="drawing a figure")

from matplotlib.axes import Axes as Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg as FigureCanvasAgg  # noqa: E402
from matplotlib.colors import ListedColormap as ListedColormap  # noqa: E402
from matplotlib.colors import LogNorm as LogNorm  # noqa: E402
from matplotlib.colors import to_rgb as to_rgb  # noqa: E402
from matplotlib.figure import Figure as Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter as FuncFormatter  # noqa: E402
from matplotlib.ticker import LogLocator as LogLocator  # noqa: E402
from matplotlib.ticker import MaxNLocator as MaxNLocator  # noqa: E402
from matplotlib.ticker import NullFormatter as NullFormatter  # noqa: E402

DPI = 144
# Okabe and Ito's colours, distinct for every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#666666"


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
  """A figure of width x height inches with one pair of `plain_axes`."""
  figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
  return figure, plain_axes(figure.subplots())


def plain_axes(axes: Axes) -> Axes:
  """Axes without a frame, with a faint horizontal grid."""
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color="#dddddd", linewidth=0.6)
  axes.set_axisbelow(True)
  return axes


def save_figure(figure: Figure, path: PathLike, dpi: int = DPI) -> pathlib.Path:
  """Write a figure as PNG; a missing folder is made.

  Raises:
    KwjaxError: the file cannot be written.
  """
  path = pathlib.Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date or version in the file: the same data gives the same bytes.
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None}, pil_kwargs={"dpi": (dpi, dpi)})
  except OSError as error:
    raise KwjaxError(f"cannot write the figure {path}: {error.strerror or error}") from error
  return path


def colour_of(index: int) -> str:
  """Colour of a curve by its index; they repeat after seven."""
  return COLOURS[index % len(COLOURS)]


def plain_text(text: str) -> str:
  """Text with escaped dollar signs, which would start matplotlib's formulas."""
  return text.replace("$", r"\$")
