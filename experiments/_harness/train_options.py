"""Options of `experiments.train_reference`, and the settings of the training that they stand for."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Annotated, Any, Literal

import tyro

from kwjax.cli.options import ByPreset, Preset
from kwjax.errors import KwjaxError
from kwjax.models import known_models, model_info
from kwjax.runtime.data import ImageData
from kwjax.synthesis import Augmentation
from kwjax.training import TrainConfig

_DIGITS = ("mnist", "svhn", "digits")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
  """Options of the training; None means: what the preset says."""

  data: str
  """Labelled images to train on: a folder of idx files, FILE.npz, tfds:NAME, a folder; `:train` is taken where no split is
  named."""
  out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")]
  """Where the network goes."""
  eval_data: str | None = None
  """Labelled images to evaluate on after the last step, used for nothing else; their test split where none is named."""
  arch: str = "resnet20"
  """Architecture; an unknown name lists the known ones. resnetN with N = 6n + 2 is CIFAR's: resnet8 is the smallest."""
  channels: Literal[1, 3] | None = None
  """Channels of the network's input. Default: those of the data; with 3, grey images become RGB."""
  flip: Literal["auto", "yes", "no"] = "auto"
  """Mirror images at random. auto: not where the name of the data says digits."""
  pad: Annotated[int, tyro.conf.arg(metavar="PIXELS")] = 4
  """Zero padding before a random crop to the old size; 0 leaves it out."""
  epochs: ByPreset = None
  """How often each image is seen."""
  batch_size: ByPreset = None
  """Images a step, over all devices."""
  limit: ByPreset = None
  """Take the first N images of each set only."""
  learning_rate: float = 0.1
  """Peak of the learning rate; the first twentieth of the steps, at most 1000, leads up to it."""
  momentum: float = 0.9
  """Of SGD."""
  weight_decay: float = 1e-4
  """L2 penalty on kernels."""
  label_smoothing: float = 0.0
  """Share of the target that is spread over all classes."""
  preset: Preset = "cpu"
  """cpu: 3 epochs, minutes on two cores. paper: 200 epochs, for accelerators. smoke: seconds."""
  workdir: pathlib.Path | None = None
  """Where checkpoints and report go. Default: runs/train_reference-..., a folder of its own for every set of options."""
  resume: bool = True
  """Go on where an earlier run with the same options stopped; --no-resume starts over."""
  seed: int = 0
  """Seed of weights, order and augmentation."""
  devices: int | None = None
  """Devices of each process that a batch is spread over. Default: all accelerators, or one a CPU core."""
  coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
  """Where process 0 of a run of several processes is reached; see docs/many_devices.md."""
  num_processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """How many processes take part."""
  process_id: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
  """Which of them this one is, from 0."""
  checkpoint_steps: Annotated[int, tyro.conf.arg(metavar="N")] = 100
  """Steps between two saved states."""


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much of everything; what a preset fills in."""

  epochs: int
  batch_size: int
  limit: int | None


_PRESETS = {"cpu": Sizes(3, 128, None), "paper": Sizes(200, 128, None), "smoke": Sizes(1, 32, 128)}


def architecture(name: str) -> tuple[str, dict[str, Any]]:
  """Registered name and options of an architecture: a CIFAR ResNet of any depth 6n + 2 is a resnet20 with n blocks a stage.

  Raises:
    KwjaxError: there is no such architecture.
  """
  depth = name.removeprefix("resnet")
  if name not in known_models() and depth.isdecimal() and int(depth) >= 8 and int(depth) % 6 == 2:
    return "resnet20", {"blocks_per_stage": (int(depth) - 2) // 6}
  return model_info(name).name, {}


def chosen_sizes(options: TrainOptions) -> Sizes:
  """What the preset says, with the options that were given put in its place.

  Raises:
    KwjaxError: a number is out of range.
  """
  given = {name: value for name in ("epochs", "batch_size", "limit") if (value := getattr(options, name)) is not None}
  for name, value in {**given, "checkpoint_steps": options.checkpoint_steps}.items():
    if value < 1:
      raise KwjaxError(f"--{name.replace('_', '-')} must be at least 1, found {value}")
  if options.pad < 0:
    raise KwjaxError(f"--pad must not be negative, found {options.pad}")
  if not 0 <= options.seed < 1 << 32:
    raise KwjaxError(f"--seed must be at least 0 and below 2^32, found {options.seed}")
  return dataclasses.replace(_PRESETS[options.preset], **given)


def train_config(options: TrainOptions, sizes: Sizes, data: ImageData) -> TrainConfig:
  """Settings of the training for one command line.

  Raises:
    KwjaxError: a number is out of range.
  """
  steps = math.ceil(len(data) * sizes.epochs / sizes.batch_size)
  name = data.name.lower()
  flips = options.flip == "yes" or (
    options.flip == "auto" and ("fashion" in name or not any(d in name for d in _DIGITS))
  )
  return TrainConfig(
    steps,
    batch_size=sizes.batch_size,
    learning_rate=options.learning_rate,
    momentum=options.momentum,
    weight_decay=options.weight_decay,
    warmup_steps=min(steps // 20, 1000),
    label_smoothing=options.label_smoothing,
    augmentation=Augmentation(pad_crop=options.pad, flip=flips),
    checkpoint_every=options.checkpoint_steps,
  )
