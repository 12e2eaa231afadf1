"""Command-line options that all studies share."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from kwjax.cli.options import ByPreset, Options, Preset
from kwjax.errors import KwjaxError

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: by the study)")]


@dataclasses.dataclass(frozen=True)
class StudyOptions:
  """Options of every study; None means: what the preset says. A study may add its own in a subclass."""

  network: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FOLDER")] = None
  """A network written by `python -m weights_conversion` or `kwjax.save_network`."""
  arch: str | None = None
  """Architecture of --weights, such as resnet44 (an unknown name lists the known ones)."""
  weights: str | None = None
  """Weights of --arch: a .pth/.safetensors file, a URL, `torchvision`, or `demo`."""
  eval_data: str | None = None
  """Labelled images to evaluate on, used for nothing else: FILE.npz:test, tfds:NAME, a folder or zip."""
  real_data: str | None = None
  """Real images for the rows that use them, for comparison; the same forms: FILE.npz:train, tfds:NAME:train."""
  preset: Preset = "cpu"
  """cpu: at most half an hour on two cores. paper: the published sizes, for accelerators. smoke: seconds."""
  seeds: tuple[int, ...] = (0,)
  """Seeds to measure now. Those of earlier runs in the same folder are shown with them: mean, standard deviation, seeds."""
  rows: Names = ()
  """Rows to measure now; the others keep what was measured before."""
  columns: Names = ()
  """Columns to measure now; a column that takes long is measured only when it is named here."""
  images: ByPreset = None
  """Images to calibrate with."""
  steps: ByPreset = None
  """Optimization steps a batch of images."""
  batch_size: ByPreset = None
  """Images optimized together."""
  duplicates: ByPreset = None
  """Independently augmented copies of each image in a step."""
  distill_steps: ByPreset = None
  """SGD steps of a fine-tuning."""
  distill_batch_size: ByPreset = None
  """Images a fine-tuning step."""
  distill_learning_rate: float | None = None
  """Peak learning rate of the fine-tuning. Default: 0.1 under --preset paper, else 0.01 (Gaussian images: a tenth and less)."""
  workdir: pathlib.Path | None = None
  """Where everything goes, over several runs. Default: runs/STUDY-NETWORK."""
  resume: bool = True
  """Keep the cells of earlier runs; --no-resume starts over."""
  devices: int | None = None
  """Devices of each process that the work is spread over. Default: all accelerators, or one a CPU core."""
  coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
  """Where process 0 of a run of several processes is reached; see docs/many_devices.md."""
  num_processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """How many processes take part."""
  process_id: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
  """Which of them this one is, from 0."""
  checkpoint_seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 20.0
  """Least time in seconds between two saved states of a synthesis."""
  checkpoint_steps: Annotated[int, tyro.conf.arg(metavar="N")] = 200
  """Fine-tuning steps between two saved states."""
  dry_run: bool = False
  """Say which cells would be measured and what that costs, and do nothing."""

  def main_job(self, scheme: str = "bns") -> Options:
    """The same choices as options of the main job, whose presets and settings the studies share."""
    shared = {f.name for f in dataclasses.fields(Options)} & {f.name for f in dataclasses.fields(StudyOptions)}
    return Options(scheme=scheme, **{name: getattr(self, name) for name in shared})  # type: ignore[arg-type]


class Missing(KwjaxError):
  """Something that a cell needs was not given; the message names the option and the command that supply it."""


def check_seeds(seeds: Sequence[int]) -> None:
  """Refuse seeds that no key can be made of, or that are given twice.

  Raises:
    KwjaxError: saying what --seeds takes.
  """
  if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 1 << 32 for seed in seeds):
    raise KwjaxError(
      f"--seeds takes different numbers of at least 0 and below 2^32, found {' '.join(map(str, seeds))!r}"
    )
