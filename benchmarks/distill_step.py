"""One full step of fine-tuning (teacher, fake-quantized student forward and backward, SGD): kwjax against PyTorch.

    python -m benchmarks.distill_step --networks resnet44,mobilenet_v2 --json distill_step.json

4 bit weights and activations, 8 in the first and last layer; weights by output channel from their current extremes, fixed
ranges of activations; BatchNorm in training mode; KL divergence of the logits; SGD with momentum on all parameters. PyTorch
rounds by its own operators, by the best of contiguous and channels-last memory, eager and torch.compile.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.calibrate import noise_images, torch_observer
from benchmarks.torch_networks import import_torch
from kwjax.network import Network
from kwjax.runtime.devices.parallel import DeviceGroup

_CALIBRATION_IMAGES = 8


def build(name: str, arguments: argparse.Namespace) -> harness.Spec:
  """Sizes of the comparison of one network, and its arithmetic: two forward passes, and a backward pass to all weights.

  Raises:
    KwjaxError: the network is unknown.
  """
  size, batch = harness.sizes(name, arguments)
  return {
    "image_size": size,
    "batch": batch,
    "bits": "4w4a",
    "first_last": "8w8a",
    "operations": 4 * harness.forward_operations(name, size) * batch,
  }


def prepare_kwjax(spec: harness.Spec, teacher: Network, group: DeviceGroup) -> Callable[[], None]:
  """A function that runs one step and waits for it."""
  from kwjax.distillation import distill_step, initial_state
  from kwjax.runtime.devices.parallel import padding_weights

  config, batch = _config(spec), spec["batch"]
  state = group.replicate(initial_state(kwjax_student(spec, teacher), config))
  # Padding, where the batch does not divide over the devices, has weight zero in the step.
  images = group.shard(noise_images(group.padded(batch), spec["image_size"]))
  teacher = group.replicate(teacher)

  def one_step(state: Any, images: Any, teacher: Any, axis_name: str | None) -> Any:
    return distill_step(state, images, teacher, config, padding_weights(batch, axis_name), axis_name)

  step = group.compile(one_step, donate=(0,))

  def run() -> None:
    nonlocal state
    state, metrics = step(state, images, teacher)
    metrics["loss"].block_until_ready()

  return run


def _config(spec: harness.Spec) -> Any:
  from kwjax.distillation import DistillConfig

  return DistillConfig.preset("short", batch_size=spec["batch"], iq_weight=0.0)


def kwjax_student(spec: harness.Spec, teacher: Any) -> Any:
  """The teacher in low precision, with the ranges of a few noise images averaged over the images."""
  from kwjax.quantization import QuantRules, Ranges, observe_ranges, quantize

  # At 4 bits and above what "auto" reads; said, because the peer knows no other reading.
  rules = QuantRules.parse(spec["bits"], first_last=spec["first_last"], weights="affine")
  table = observe_ranges(teacher, noise_images(_CALIBRATION_IMAGES, spec["image_size"]), devices=1)
  ranges = {name: (np.mean(ends.lo), np.mean(ends.hi)) for name, ends in table.items()}
  return quantize(teacher, rules, Ranges(ranges))


def prepare_torch(spec: harness.Spec, network: Any) -> Callable[[], None]:
  """The same step in PyTorch, as its users would write it."""
  torch = import_torch()
  layout, _, compiled = spec["variant"].partition("+")
  memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
  student, loss_of = torch_loss(spec, network)
  config = _config(spec)
  optimizer = torch.optim.SGD(student.parameters(), lr=config.learning_rate, momentum=config.momentum, fused=True)
  images = torch.from_numpy(noise_images(spec["batch"], spec["image_size"])).permute(0, 3, 1, 2)
  images = images.contiguous(memory_format=memory)
  function = torch.compile(loss_of) if compiled else loss_of

  def run() -> None:
    optimizer.zero_grad(set_to_none=True)
    loss = function(images)
    loss.backward()
    optimizer.step()
    loss.item()

  return run


def torch_loss(spec: harness.Spec, network: Any) -> tuple[Any, Callable[[Any], Any]]:
  """A student in PyTorch, and the KL divergence of its logits from the network's.

  Args:
    spec: `network`, `variant`, `image_size`, `bits` and `first_last`.
    network: PyTorch's, in evaluation mode: the teacher.

  Returns:
    The student, a module, and `images f32[b,3,s,s] in [0,1] -> loss f32[]`, which moves its running statistics.
  """
  from kwjax.models import model_info

  torch = import_torch()
  functional = torch.nn.functional
  layout = spec["variant"].partition("+")[0]
  memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
  teacher = network.to(memory_format=memory).requires_grad_(False)
  student = copy.deepcopy(teacher).requires_grad_(True)
  # In evaluation mode but for BatchNorm: no dropout and no skipped blocks, as in kwjax.
  for module in student.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      module.train().momentum = 0.1
  observe = torch_observer({**spec, "variant": layout, "batch": _CALIBRATION_IMAGES}, copy.deepcopy(teacher))
  table = observe(noise_images(_CALIBRATION_IMAGES, spec["image_size"]))
  ends = (next(iter(table)), next(reversed(table)))
  for name, (lowest, highest) in table.items():
    bits = spec["first_last" if name in ends else "bits"]
    _quantize(student.get_submodule(name), bits, float(np.mean(lowest)), float(np.mean(highest)))
  info = model_info(spec["network"])
  mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (info.input_mean, info.input_std))

  def loss_of(images: Any) -> Any:
    x = (images - mean) / std
    with torch.no_grad():
      wanted = functional.log_softmax(teacher(x), -1)
    found = functional.log_softmax(student(x), -1)
    return functional.kl_div(found, wanted, reduction="batchmean", log_target=True)

  return student, loss_of


def _quantize(module: Any, bits: str, lowest: float, highest: float) -> None:
  """Rounds a layer's kernel, by output channel from its current extremes, and its input, to the levels of a range."""
  from kwjax.quantization import Bits

  torch = import_torch()
  parsed = Bits.parse(bits)
  assert parsed.weights is not None
  assert parsed.activations is not None
  weight_top, input_top = 2**parsed.weights - 1, 2**parsed.activations - 1

  class FakeQuantized(torch.nn.Module):  # type: ignore[misc, name-defined]
    def forward(self, weight: Any) -> Any:
      low, high = weight.detach().flatten(1).aminmax(dim=1)
      scale = (high - low) / weight_top
      return torch.fake_quantize_per_channel_affine(weight, scale, -low / scale, 0, 0, weight_top)

  lowest, highest = min(lowest, 0.0), max(highest, 0.0)
  scale = (highest - lowest) / input_top
  zero = round(-lowest / scale)
  torch.nn.utils.parametrize.register_parametrization(module, "weight", FakeQuantized())
  module.register_forward_pre_hook(
    lambda module, inputs: (torch.fake_quantize_per_tensor_affine(inputs[0], scale, zero, 0, input_top), *inputs[1:])
  )


def main(args: Sequence[str] | None = None) -> int:
  """Command line; returns the exit status."""
  parser = harness.parser(__doc__)
  return harness.run(parser.parse_args(args), "benchmarks.distill_step", build, "distill step")


if __name__ == "__main__":
  sys.exit(main())
