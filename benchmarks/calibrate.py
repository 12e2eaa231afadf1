"""Observing the extremes of every layer's input, image by image, which is what calibration costs: kwjax against PyTorch.

    python -m benchmarks.calibrate --networks resnet44,mobilenet_v2 --json calibrate.json

Both forward the same images in batches of the same size through the same network and end with the table of extremes on the
host: kwjax by the driver that `kwjax.calibrate` runs, PyTorch by hooks on its modules under inference mode, by the best of
contiguous and channels-last memory, eager and torch.compile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.torch_networks import import_torch
from kwjax.network import Network
from kwjax.runtime.devices.parallel import DeviceGroup

_BATCH = 64  # what `kwjax.calibrate` forwards at a time


def build(name: str, arguments: argparse.Namespace) -> harness.Spec:
  """Sizes of the comparison of one network, and its arithmetic: a forward pass an image.

  Raises:
    KwjaxError: the network is unknown.
  """
  size, _ = harness.sizes(name, arguments)
  images = arguments.images or (256 if size <= 64 else 64)
  return {
    "image_size": size,
    "images": images,
    "batch": min(arguments.batch or _BATCH, images),
    "operations": harness.forward_operations(name, size) * images,
  }


def noise_images(count: int, size: int) -> np.ndarray:
  """f32[n,s,s,3], uniform in [0,1], the same at every call."""
  return np.random.default_rng(0).random((count, size, size, 3), np.float32)


def prepare_kwjax(spec: harness.Spec, network: Network, group: DeviceGroup) -> Callable[[], None]:
  """A function that observes all images and waits for the table."""
  from kwjax.quantization import observe_ranges

  images = noise_images(spec["images"], spec["image_size"])

  def run() -> None:
    observe_ranges(network, images, batch_size=spec["batch"], devices=group)

  return run


def prepare_torch(spec: harness.Spec, network: Any) -> Callable[[], None]:
  """The same in PyTorch, as its users would write it."""
  observe, images = torch_observer(spec, network), noise_images(spec["images"], spec["image_size"])

  def run() -> None:
    observe(images)

  return run


def torch_observer(spec: harness.Spec, network: Any) -> Callable[[np.ndarray], dict[str, tuple[Any, Any]]]:
  """Extremes by PyTorch: `images f32[n,s,s,3] in [0,1] -> {module: (lowest f32[n], highest f32[n])}`.

  Args:
    spec: `network`, `variant` and `batch`, the number of images forwarded at a time.
    network: PyTorch's, in evaluation mode; it keeps the hooks.

  Returns:
    A function whose table has the modules in the order in which they are called.
  """
  from kwjax.models import model_info

  torch = import_torch()
  layout, _, compiled = spec["variant"].partition("+")
  memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
  network, info = network.to(memory_format=memory), model_info(spec["network"])
  mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (info.input_mean, info.input_std))
  found: dict[str, Any] = {}

  def watch(name: str) -> Callable[[Any, Any], None]:
    def note(module: Any, inputs: Any) -> None:
      x = inputs[0]
      # In the order of the memory one pass serves both ends, three times as fast as amin and amax.
      rows = x.permute(0, 2, 3, 1) if layout == "channels_last" and x.ndim == 4 else x
      found[name] = rows.flatten(1).aminmax(dim=1)

    return note

  for name, module in network.named_modules():
    if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
      module.register_forward_pre_hook(watch(name))

  def extremes(images: Any) -> dict[str, Any]:
    found.clear()
    network((images - mean) / std)
    return dict(found)

  function = torch.compile(extremes) if compiled else extremes

  def observe(images: np.ndarray) -> dict[str, tuple[Any, Any]]:
    with torch.inference_mode():
      batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(spec["batch"])
      parts = [function(batch.contiguous(memory_format=memory)) for batch in batches]
      joined = {name: [torch.cat(end) for end in zip(*(p[name] for p in parts), strict=True)] for name in parts[0]}
      return {name: (lowest.numpy(), highest.numpy()) for name, (lowest, highest) in joined.items()}

  return observe


def main(args: Sequence[str] | None = None) -> int:
  """Command line; returns the exit status."""
  parser = harness.parser(__doc__, batch=f"{_BATCH}, what calibration forwards at a time")
  parser.add_argument("--images", type=int, metavar="N", help="images observed (default: 256 at 32x32, else 64)")
  return harness.run(parser.parse_args(args), "benchmarks.calibrate", build, "calibrate")


if __name__ == "__main__":
  sys.exit(main())
