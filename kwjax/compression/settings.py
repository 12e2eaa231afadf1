"""How much of everything a compression does, and how: what suits the size of a network's images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from kwjax.compression.workspace import GAUSSIAN, is_small
from kwjax.distillation import DistillConfig
from kwjax.errors import KwjaxError
from kwjax.intercept import batch_norm_layers
from kwjax.network import Network
from kwjax.runtime.devices import memory
from kwjax.synthesis import PAPER_ROWS, SynthesisConfig

Preset = Literal["cpu", "paper", "smoke"]
PUBLISHED = "paper"


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much of everything.

  Attributes:
    images: to calibrate and fine-tune with.
    held_out: images beside them, for the agreement with the float network.
    steps: of the synthesis, a batch.
    batch_size: images of the synthesis that are optimized together.
    duplicates: augmented copies of each image in a step of the synthesis.
    distill_steps: steps of the fine-tuning.
    distill_batch_size: images a step of the fine-tuning.
    calibration_steps: random batches that a calibration averages over.
    calibration_batch: images in each of them.
    reconstruct_iterations: iterations of each unit of the reconstruction; 0: there is none.
    reconstruct_batch_size: images in each of them.
  """

  images: int
  held_out: int
  steps: int
  batch_size: int
  duplicates: int
  distill_steps: int
  distill_batch_size: int
  calibration_steps: int
  calibration_batch: int
  reconstruct_iterations: int
  reconstruct_batch_size: int


_PRESETS: dict[tuple[str, bool], Sizes] = {
  # (preset, whether images are small): CIFAR-sized networks and ImageNet-sized ones
  ("cpu", True): Sizes(384, 128, 120, 128, 1, 120, 64, 200, 256, 150, 32),
  # No reconstruction of large images: from 64 of them it fits what is particular to synthetic ones, which held-out synthetic
  # images cannot tell. EfficientNet-Lite0 at 4w4a has 0.49 -> 0.39 nats on these and 0.40 -> 0.48 on real ones.
  ("cpu", False): Sizes(64, 32, 60, 32, 1, 40, 16, 200, 256, 0, 8),
  (PUBLISHED, True): Sizes(500, 125, 1000, 800, 4, 16000, 256, 200, 256, 0, 32),
  (PUBLISHED, False): Sizes(10000, 2500, 1000, 80, 4, 44000, 256, 200, 256, 0, 32),
  ("smoke", True): Sizes(8, 2, 3, 10, 1, 2, 4, 2, 16, 2, 4),
  ("smoke", False): Sizes(3, 1, 2, 4, 1, 1, 2, 2, 16, 2, 2),
}


def sizes_for(
  network: Network, preset: str, given: Mapping[str, int], *, spell: Callable[[str], str] = lambda name: name
) -> Sizes:
  """What a preset says for a network, with some numbers put in its place.

  Args:
    network: its image size decides.
    preset: "cpu", "paper" or "smoke".
    given: numbers by the name of their field.
    spell: from the name of a field to what the caller calls it, for the message.

  Raises:
    KwjaxError: a number is out of range.
  """
  for name, value in given.items():
    least = 0 if name in ("distill_steps", "steps", "reconstruct_iterations") else 1
    if value < least:
      raise KwjaxError(f"{spell(name)} must be at least {least}, found {value}")
  return dataclasses.replace(_PRESETS[preset, is_small(network)], **given)


def synthesis_config(
  network: Network, scheme: str, chosen: Sizes, *, preset: str = "cpu", given: Mapping[str, int] | None = None
) -> SynthesisConfig:
  """Settings of a synthesis: the published ones under "paper", else the project's defaults at the chosen size.

  Args:
    network: its architecture and image size decide.
    scheme: how images are made.
    chosen: steps, batch size and duplicates, unless they are the published ones.
    preset: see `sizes_for`.
    given: those of the three that replace the published ones.

  Raises:
    KwjaxError: there is no such scheme, or no published settings for this network's architecture.
  """
  if scheme == GAUSSIAN:
    return SynthesisConfig.preset(GAUSSIAN)
  if preset == PUBLISHED:
    changes = dict(given or {})
    row = next((row for row in PAPER_ROWS if network.arch and row.startswith(network.arch + "_")), None)
    config = SynthesisConfig.preset(scheme, row or ("resnet44_cifar10" if is_small(network) else "resnet18_imagenet"))
    if "steps" in changes:
      config = config.with_steps(changes.pop("steps"))
    return config.replace(**changes)
  config = SynthesisConfig.for_network(scheme, min(network.image_shape[:2]))
  config = config.with_steps(chosen.steps).replace(batch_size=chosen.batch_size, duplicates=chosen.duplicates)
  if not config.objective.needs_statistics and batch_norm_layers(network):
    # Scheme I does not optimize J_KL, but how it moves all the same is worth seeing.
    return config.replace(objective=dataclasses.replace(config.objective, monitor=("bns",)))
  return config


def memory_need(
  network: Network, config: SynthesisConfig | None, *, images: int, trained: int, devices: int
) -> memory.Need:
  """Memory at the peak of a synthesis and a fine-tuning.

  Args:
    network: the float network.
    config: of the synthesis; None: there is none.
    images: in a set.
    trained: images a step of the fine-tuning; 0: there is none.
    devices: number that a step is spread over.
  """
  optimizes = config is not None and config.is_optimized and config.steps
  synthesized = min(config.batch_size, images) * config.duplicates if config is not None and optimizes else 0
  return memory.predict(network, images=images, synthesized=synthesized, trained=trained, devices=devices)


@dataclasses.dataclass(frozen=True)
class FineTuning:
  """How a student is fine-tuned, as far as it does not depend on how good its calibration was.

  Attributes:
    steps: of SGD; None: what suits the size of the images.
    batch_size: images a step; None: likewise.
    learning_rate: its peak; None: 0.1 with the published settings; else 0.0001 for a student that corrected moments have
      brought near the float network, 0.001 with Gaussian images and 0.01 otherwise.
    published: whether the other settings are those of Haroush et al. (2020) or those that suit a short run.
    scales_warmup: whether the warm-up is a twentieth of the steps, rather than the published one.
  """

  steps: int | None = None
  batch_size: int | None = None
  learning_rate: float | None = None
  published: bool = False
  scales_warmup: bool = True

  def filled(self, chosen: Sizes) -> FineTuning:
    """With the numbers of `chosen` where none are given."""
    steps = chosen.distill_steps if self.steps is None else self.steps
    batch_size = chosen.distill_batch_size if self.batch_size is None else self.batch_size
    return dataclasses.replace(self, steps=steps, batch_size=batch_size)

  def config(self, network: Network, scheme: str, *, near: bool = False) -> DistillConfig:
    """The settings for a network, of numbers that are `filled`.

    Args:
      network: its image size tells CIFAR's settings from ImageNet's.
      scheme: of the images.
      near: whether the student's corrected moments have brought it near the float network already.
    """
    assert self.steps is not None
    assert self.batch_size is not None
    # Noise has other statistics than data, and the statistics of a batch would throw a correction away, so the running ones
    # are kept; and without the batch's own only a tenth of the learning rate is stable, or less next to a good start.
    frozen = scheme == GAUSSIAN or near
    changes: dict[str, Any] = {
      "steps": self.steps,
      "batch_size": self.batch_size,
      "batch_norm": "frozen" if frozen else "train",
    }
    if self.scales_warmup:
      changes["warmup_steps"] = self.steps // 20
    if self.learning_rate is not None:
      changes["learning_rate"] = self.learning_rate
    elif frozen:
      changes["learning_rate"] = 0.01 if self.published else 0.0001 if near else 0.001
    name = ("cifar" if is_small(network) else "imagenet") if self.published else "short"
    return DistillConfig.preset(name, **changes)
