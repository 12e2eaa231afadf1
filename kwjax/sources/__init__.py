"""Where the images of a training come from: sets, noise, pixels under optimization, and sources of your own."""

from kwjax.sources.base import Batch, Source
from kwjax.sources.fixed import FixedSet, assemble
from kwjax.sources.mixup import Mixing, Mixup, draw_mixing, mix
from kwjax.sources.noise import FreshNoise
from kwjax.sources.pixels import Pixels, PixelsState
from kwjax.sources.plan import Plan, planner
from kwjax.sources.run import RunState

__all__ = [
  "Batch",
  "FixedSet",
  "FreshNoise",
  "Mixing",
  "Mixup",
  "Pixels",
  "PixelsState",
  "Plan",
  "RunState",
  "Source",
  "assemble",
  "draw_mixing",
  "mix",
  "planner",
]
