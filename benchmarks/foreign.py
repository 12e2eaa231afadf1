"""One step of optimizing images with a network that somebody else wrote, against our own MobileNetV2 of the same shape.

    python -m benchmarks.foreign

The other one is plain Flax: depthwise layers are `nn.Conv` with as many groups as channels. Both are timed in turn in one
process. A ratio near one says that the fast forms for CPUs reach any module.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Sequence

import flax.linen as nn
import jax

from benchmarks import sample_step
from kwjax.errors import KwjaxError
from kwjax.models import get_model, model_info
from kwjax.network import Network

_ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class Bottleneck(nn.Module):
  """Inverted residual block: expand, filter each channel, project."""

  width: int
  expand: int
  stride: int

  @nn.compact
  def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
    """Returns the projection, plus the input where the shapes agree."""
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
    inner, x = self.expand * inputs.shape[-1], inputs
    if self.expand > 1:
      x = nn.relu6(norm()(nn.Conv(inner, (1, 1), use_bias=False)(x)))
    x = nn.Conv(inner, (3, 3), self.stride, padding=1, feature_group_count=inner, use_bias=False, name="depthwise")(x)
    x = nn.relu6(norm()(x))
    x = norm()(nn.Conv(self.width, (1, 1), use_bias=False)(x))
    return inputs + x if inputs.shape == x.shape else x


class ForeignMobileNet(nn.Module):
  """MobileNetV2 with names and habits of its own."""

  classes: int = 1000

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps normalised images f32[b,h,w,3] to logits f32[b,classes]."""
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
    x = nn.relu6(norm()(nn.Conv(32, (3, 3), 2, padding=1, use_bias=False, name="stem")(x)))
    for expand, width, repeats, stride in _ROWS:
      for i in range(repeats):
        x = Bottleneck(width, expand, stride if i == 0 else 1)(x, train)
    x = nn.relu6(norm()(nn.Conv(1280, (1, 1), use_bias=False, name="head")(x)))
    return nn.Dense(self.classes)(x.mean((1, 2)))


def _network(module: nn.Module, name: str, size: int) -> Network:
  info = model_info("mobilenet_v2")
  variables = jax.jit(module.init)(jax.random.key(0), jax.numpy.zeros((1, size, size, 3)))
  return Network(
    module, variables, image_shape=(size, size, 3), input_mean=info.input_mean, input_std=info.input_std, name=name
  )


def measure(size: int, batch: int, repeats: int) -> dict[str, float]:
  """Milliseconds of a step of each network, medians of steps in turn, and the foreign one's over our own.

  Args:
    size: side of the images, in pixels.
    batch: distinct images a step.
    repeats: steps of each.
  """
  from kwjax.cli.command import every_device

  spec = {"image_size": size, "batch": batch, "duplicates": 1}
  modules = {"own": get_model("mobilenet_v2"), "foreign": ForeignMobileNet()}
  steps = {
    name: sample_step.prepare_kwjax(spec, _network(module, name, size), every_device(None))
    for name, module in modules.items()
  }
  times: dict[str, list[float]] = {name: [] for name in steps}
  for step in [*steps.values()] * 2:  # compiled, then warm
    step()
  for _ in range(repeats):
    for name, step in steps.items():
      start = time.perf_counter()
      step()
      times[name].append(1e3 * (time.perf_counter() - start))
  own, foreign = (statistics.median(times[name]) for name in ("own", "foreign"))
  return {"own": own, "foreign": foreign, "ratio": foreign / own}


def main(args: Sequence[str] | None = None) -> int:
  """Command line; returns the exit status."""
  from kwjax.cli.command import use_compilation_cache, use_every_core
  from kwjax.runtime.devices.launch import keep_freed_memory

  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="default: %(default)s")
  parser.add_argument(
    "--batch", type=int, default=16, metavar="N", help="distinct images a step (default: %(default)s)"
  )
  parser.add_argument("--repeats", type=int, default=10, help="steps of each network (default: %(default)s)")
  options = parser.parse_args(args)
  keep_freed_memory()
  use_compilation_cache()
  use_every_core(None)
  try:
    found = measure(options.image_size, options.batch, options.repeats)
  except KwjaxError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print("own {own:.1f} ms, foreign {foreign:.1f} ms, ratio {ratio:.2f}".format(**found))
  return 0


if __name__ == "__main__":
  sys.exit(main())
