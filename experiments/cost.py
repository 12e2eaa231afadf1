"""What a run would do and cost, for --dry-run: operations and bytes from the layers' shapes, time from a quick probe."""

from __future__ import annotations

import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.options import Sizes
from kwjax import intercept
from kwjax.network import Network
from kwjax.synthesis import SynthesisConfig

_EFFICIENCY = 0.3  # of a matrix product's rate; what whole networks reached on CPUs and GPUs


def matmul_rate(size: int = 1024, repeats: int = 5) -> float:
  """Floating-point operations a second of a float32 matrix product on the default device, the best of a few."""
  x = jnp.ones((size, size), jnp.float32)
  product = jax.jit(lambda a: a @ a)
  product(x).block_until_ready()
  best = np.inf
  for _ in range(repeats):
    start = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def activation_bytes(network: Network) -> int:
  """Bytes that the backward pass of one image keeps: the float32 inputs of all layers with weights or statistics."""
  kept = (layer for layer in intercept.layers(network) if layer.primitive)
  return 4 * sum(int(np.prod(layer.input_shape)) * layer.repeats for layer in kept)


def describe(
  network: Network,
  config: SynthesisConfig,
  chosen: Sizes,
  bits: tuple[str, ...],
  folder: pathlib.Path,
  *,
  labelled: int,
) -> str:
  """The text of --dry-run."""
  images = chosen.images + chosen.held_out
  forward = 2 * sum(layer.multiplications for layer in intercept.layers(network))
  # Backward to the images alone costs one more forward; backward to the weights as well costs two.
  synthesis = images * config.duplicates * config.steps * 2 * forward if config.is_optimized else 0
  runs = 2 * len(bits)
  # Every copy is scored beside the float network, and where there are labels once more for its accuracy.
  evaluation = forward * (2 * images + (images - chosen.images) * 2 * (runs + 1) + labelled * 3 * (runs + 1))
  distillation = chosen.distill_steps * chosen.distill_batch_size * 4 * forward
  batch = min(config.batch_size, images) * config.duplicates
  memory = max(batch, chosen.distill_batch_size) * activation_bytes(network) * 2
  rate = matmul_rate()
  total = synthesis + evaluation + distillation
  return "\n".join(
    [
      f"network       {network.name}: {forward / 2e9:.3f} G multiply-adds an image of {'x'.join(map(str, network.image_shape))}",
      f"synthesis     {images} {config.scheme} images ({chosen.images} to use, the rest held out), batches of up to "
      f"{config.batch_size}, {config.duplicates} copies, {config.steps} steps: {synthesis / 1e12:.2f} T operations",
      f"calibration   {', '.join(bits)} with {config.scheme} and gaussian images; agreement and accuracy on "
      f"{images - chosen.images} held-out and {labelled} labelled images: {evaluation / 1e12:.2f} T operations",
      f"fine-tuning   {bits[-1]}: {chosen.distill_steps} steps of {chosen.distill_batch_size} images: "
      f"{distillation / 1e12:.2f} T operations",
      f"memory        about {memory / 2**30:.1f} GiB at most on the device",
      f"time          about {total / (rate * _EFFICIENCY) / 60:.1f} minutes if convolutions reach {_EFFICIENCY:.0%} of the "
      f"{rate / 1e9:.0f} GFLOP/s that a matrix product just reached here ({jax.devices()[0].device_kind}), "
      "plus a minute or two of compilation at the first run",
      f"results       {folder}",
    ]
  )
