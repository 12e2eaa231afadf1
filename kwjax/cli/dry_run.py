"""What the main job would do and cost, for --dry-run."""

from __future__ import annotations

import pathlib

import jax

from kwjax import intercept
from kwjax.compression.settings import Sizes
from kwjax.network import Network
from kwjax.quantization import Bits
from kwjax.runtime.cost import EFFICIENCY, matmul_rate
from kwjax.runtime.devices.memory import Need
from kwjax.synthesis import SynthesisConfig


def describe(
  network: Network,
  config: SynthesisConfig,
  chosen: Sizes,
  bits: tuple[str, ...],
  folder: pathlib.Path,
  *,
  views: int,
  labelled: int,
  need: Need,
) -> str:
  """The text of --dry-run."""
  images = chosen.images + chosen.held_out
  forward = 2 * sum(layer.multiplications for layer in intercept.layers(network))
  # Backward to the images alone costs one more forward; backward to the weights as well costs two.
  synthesis = images * config.duplicates * config.steps * 2 * forward if config.is_optimized else 0
  runs = 2 * len(bits)
  # The float network and every student, the fine-tuned one among them, see each image once.
  seen = 3 * images + (images - chosen.images + labelled) * (runs + 2)
  evaluation = forward * (seen + 2 * len(bits) * chosen.images * (views - 1))
  distillation = chosen.distill_steps * chosen.distill_batch_size * 4 * forward
  rebuilt = (
    [text for text in bits if min(n or 32 for n in Bits.parse(text)) < 8] if chosen.reconstruct_iterations else []
  )
  # Forward and backward of the float prefix's unit and the quantized one, and the passes that collect features.
  iterations = chosen.reconstruct_iterations * chosen.reconstruct_batch_size
  reconstruction = len(rebuilt) * forward * (3 * iterations + 4 * chosen.images * views)
  each = f" ({views} views)" if views > 1 else ""
  rate = matmul_rate()
  total = synthesis + evaluation + reconstruction + distillation
  return "\n".join(
    [
      f"network       {network.name}: {forward / 2e9:.3f} G multiply-adds an image of {'x'.join(map(str, network.image_shape))}",
      f"synthesis     {images} {config.scheme} images ({chosen.images} to use, the rest held out), batches of up to "
      f"{config.batch_size}, {config.steps} steps on {config.duplicates} {'view' if config.duplicates == 1 else 'views'} "
      f"of each: {synthesis / 1e12:.2f} T operations",
      f"calibration   {', '.join(bits)} with {config.scheme}{each} and gaussian images; agreement and accuracy on "
      f"{images - chosen.images} held-out and {labelled} labelled images: {evaluation / 1e12:.2f} T operations",
      f"reconstruct   {', '.join(rebuilt) or 'nothing'}: {chosen.reconstruct_iterations} iterations of "
      f"{chosen.reconstruct_batch_size} images a block: {reconstruction / 1e12:.2f} T operations",
      f"fine-tuning   {bits[-1]}, if it stays far from the float network: {chosen.distill_steps} steps of "
      f"{chosen.distill_batch_size} images: {distillation / 1e12:.2f} T operations",
      f"memory        about {need.device / 2**30:.1f} GiB on a device and {need.host / 2**30:.1f} GiB on the host at most",
      f"time          about {total / (rate * EFFICIENCY) / 60:.1f} minutes if convolutions reach {EFFICIENCY:.0%} of the "
      f"{rate / 1e9:.0f} GFLOP/s that a matrix product just reached here ({jax.devices()[0].device_kind}), "
      "plus a minute or two of compilation at the first run",
      f"results       {folder}",
    ]
  )
