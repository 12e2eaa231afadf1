"""One full step of optimizing images (augment, forward, objective, input gradient, Adam): kwjax against PyTorch.

    python -m benchmarks.sample_step --networks resnet44,mobilenet_v2 --json sample_step.json

Both run the same network with the same weights, the BNS objective over all BatchNorm layers and the input, and the same
random views (resampling matrices); PyTorch by the best of contiguous and channels-last memory, the better one also under
torch.compile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import harness
from benchmarks.torch_networks import import_torch
from kwjax.network import Network
from kwjax.runtime.devices.parallel import DeviceGroup


def build(name: str, arguments: argparse.Namespace) -> harness.Spec:
  """Sizes of the comparison of one network, and its arithmetic: a forward pass, and a backward pass to the images.

  Raises:
    KwjaxError: the network is unknown.
  """
  size, batch = harness.sizes(name, arguments)
  duplicates = arguments.duplicates or 1
  return {
    "image_size": size,
    "batch": batch,
    "duplicates": duplicates,
    "operations": 2 * harness.forward_operations(name, size) * batch * duplicates,
  }


def prepare_kwjax(spec: harness.Spec, network: Network, group: DeviceGroup) -> Callable[[], None]:
  """A function that runs one step and waits for it."""
  import jax

  from kwjax.synthesis import SynthesisConfig
  from kwjax.synthesis.pixels import initial_images, initial_state
  from kwjax.synthesis.synthesize import compiled_step

  config = SynthesisConfig.for_network("bns", spec["image_size"])
  config = config.replace(batch_size=spec["batch"], duplicates=spec["duplicates"])
  key = jax.random.key(0)
  # Padding, where the batch does not divide over the devices, has weight zero in the step.
  padded = group.padded(spec["batch"])
  state = initial_state(config, initial_images(config, key, padded, network.image_shape))
  state = jax.tree.map(lambda leaf: group.shard(leaf) if leaf.ndim else group.replicate(leaf), state)
  labels = group.shard(jax.numpy.zeros(padded, "int32"))
  network, key = group.replicate(network), group.replicate(key)
  step = compiled_step(config, group, spec["batch"])

  def run() -> None:
    nonlocal state
    state, metrics = step(state, labels, network, key)
    metrics["loss"].block_until_ready()

  return run


def prepare_torch(spec: harness.Spec, network: Any) -> Callable[[], None]:
  """The same step in PyTorch, as its users would write it."""
  from kwjax.synthesis import SynthesisConfig

  torch = import_torch()
  layout, _, compiled = spec["variant"].partition("+")
  memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
  size, batch = spec["image_size"], spec["batch"]
  augmentation = SynthesisConfig.for_network("bns", size).augmentation
  images = torch.rand(batch, 3, size, size).to(memory_format=memory).requires_grad_(True)
  optimizer = torch.optim.Adam([images], lr=0.1, fused=True)
  loss_of = torch_loss(spec, network)
  function = torch.compile(loss_of) if compiled else loss_of

  def run() -> None:
    with torch.no_grad():
      images.clamp_(0, 1)
      rows, columns = draw_views(batch, spec["duplicates"], size, augmentation)
    optimizer.zero_grad(set_to_none=True)
    loss = function(images, rows, columns)
    loss.backward()
    optimizer.step()
    loss.item()

  return run


def torch_loss(spec: harness.Spec, network: Any) -> Callable[[Any, Any, Any], Any]:
  """The BNS objective in PyTorch: `(images f32[b,3,s,s], rows f32[b,n,1,s,s], columns likewise) -> loss f32[]`."""
  from kwjax.models import model_info

  torch = import_torch()
  memory = torch.channels_last if spec["variant"].startswith("channels_last") else torch.contiguous_format
  network = network.to(memory_format=memory).requires_grad_(False)
  info = model_info(spec["network"])
  mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (info.input_mean, info.input_std))
  measured: list[Any] = []
  norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
  for norm in norms:
    norm.register_forward_pre_hook(
      lambda module, inputs: measured.append(torch.var_mean(inputs[0], (0, 2, 3), correction=0))
    )
  reference = [(norm.running_var, norm.running_mean) for norm in norms] + [(std.flatten() ** 2, mean.flatten())]

  def loss_of(pixels: Any, rows: Any, columns: Any) -> Any:
    measured.clear()
    views = torch.matmul(torch.matmul(rows, pixels[:, None]), columns).flatten(0, 1).contiguous(memory_format=memory)
    moments = torch.var_mean(views, (0, 2, 3), correction=0)
    network((views - mean) / std)
    terms = []
    for (var, centre), (found_var, found_mean) in zip(reference, [*measured, moments], strict=True):
      found_var = found_var + 1e-8
      kl = 0.5 * (torch.log(found_var / var) - 1 + (var + (centre - found_mean) ** 2) / found_var)
      terms.append(torch.log1p(kl.clamp_min(0)).mean())
    return torch.stack(terms).mean()

  return loss_of


def draw_views(batch: int, duplicates: int, size: int, augmentation: Any) -> tuple[Any, Any]:
  """Resampling matrices f32[b,n,1,s,s] of random crops and flips: view = rows @ image @ columns."""
  torch = import_torch()
  shape = (batch, duplicates, 1, 1, 1)
  grid = torch.arange(size, dtype=torch.float32)
  if augmentation.crop_resize is not None:
    low, high = augmentation.crop_resize
    side = torch.sqrt(low + (high - low) * torch.rand(shape))
    scales, starts = [side, side], [torch.rand(shape) * (1 - side) * size for _ in range(2)]
  else:
    pad = augmentation.pad_crop
    scales = [torch.ones(shape)] * 2
    starts = [torch.randint(-pad, pad + 1, shape).float() for _ in range(2)]
  flip = torch.rand(shape) < 0.5
  matrices = []
  for axis, (scale, start) in enumerate(zip(scales, starts, strict=True)):
    source = (grid.view(-1, 1) + 0.5) * scale - 0.5 + start
    if axis == 1:
      source = torch.where(flip, source.flip(-2), source)
    if augmentation.crop_resize is not None:
      source = source.clamp(0, size - 1)
    matrices.append((1 - (source - grid).abs()).clamp_min(0))
  return matrices[0], matrices[1].transpose(-1, -2)


def main(args: Sequence[str] | None = None) -> int:
  """Command line; returns the exit status."""
  parser = harness.parser(__doc__)
  parser.add_argument("--duplicates", type=int, metavar="N", help="views of each image (default: 1)")
  return harness.run(parser.parse_args(args), "benchmarks.sample_step", build, "sample step")


if __name__ == "__main__":
  sys.exit(main())
