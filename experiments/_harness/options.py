"""Command-line options of the main job, and what a preset fills in."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
from typing import Annotated, Any, Literal

import tyro

from kwjax.errors import KwjaxError
from kwjax.intercept import batch_norm_layers
from kwjax.network import Network, fingerprint
from kwjax.runtime.files import canonical_json, sha256_file
from kwjax.synthesis import PAPER_ROWS, SynthesisConfig

ByPreset = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: by --preset)")]
Scheme = Literal["bns", "inception", "bns+inception", "deepinversion", "gaussian"]
Preset = Literal["cpu", "paper", "smoke"]


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the main job; None means: what the preset says."""

  network: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FOLDER")] = None
  """A network written by `python -m weights_conversion` or `kwjax.save_network`."""
  arch: str | None = None
  """Architecture of --weights, such as resnet18 (an unknown name lists the known ones)."""
  weights: str | None = None
  """Weights of --arch: a .pth/.safetensors file, a URL, `torchvision`, or `demo` (the embedded EfficientNet-Lite0)."""
  scheme: Scheme = "bns"
  """How images are made. Gaussian images are always made beside them, as the baseline."""
  bits: tuple[str, ...] = ("8w8a", "4w8a", "4w4a")
  """Precisions to calibrate, each #w#a; the last one named is fine-tuned and saved."""
  first_last: str | None = "8w8a"
  """Precision of the first convolution and of the classifier; `none` treats them like the rest."""
  overrides: tuple[str, ...] = ()
  """Exceptions to --bits, each PATTERN=BITS: a layer path, a regular expression, or `1x1` (1x1=8w8a)."""
  weight_reading: Literal["integer", "auto", "affine", "affine0", "sym", "symfull", "midrise"] | None = None
  """Grid of the weights. integer: affine0 from 4 bits on, symfull below; such copies are saved and exported as integers. auto:
  affine instead of affine0, the paper's, which has no integer form. Default: auto under --calibration paper, else integer."""
  calibration: Literal["best", "paper"] | None = None
  """best: what made the best copies without data (docs/results.md): weight ranges of least squared error from 3 bits on, and the
  moments of all channels brought back to the float network's. paper: extremes alone. Default: paper under --preset paper, else
  best."""
  range_reading: Literal["sample", "chunk", "percentile", "mse", "entropy"] | None = None
  """Activation ranges: the mean over samples of each one's extremes, or over chunks of 16 of the chunk's; or, of all values,
  99.99 %, the range of least squared error, or of least KL. Default: by --calibration."""
  weight_range: Literal["minmax", "mse"] | None = None
  """Each channel's weights: the whole range, or the part of it with the least squared error. Default: by --calibration."""
  correction: Literal["none", "mean", "moments"] | None = None
  """Bring the means of all channels back to the float network's on the images, or BatchNorm's variances as well. Default: by
  --calibration."""
  equalize: bool = False
  """Move scale between neighbouring layers first, where that changes nothing (ReLU networks)."""
  images: ByPreset = None
  """Distinct images to synthesize for calibration and fine-tuning."""
  held_out: ByPreset = None
  """Images to synthesize beside them, on which only the agreement with the float network is measured."""
  steps: ByPreset = None
  """Optimization steps a batch."""
  batch_size: ByPreset = None
  """Images optimized together."""
  duplicates: ByPreset = None
  """Independently augmented copies of each image in a step."""
  distill_steps: ByPreset = None
  """SGD steps of the fine-tuning; 0 leaves it out."""
  distill_batch_size: ByPreset = None
  """Images a fine-tuning step."""
  distill_learning_rate: float | None = None
  """Peak learning rate of the fine-tuning. Default: 0.1 under --preset paper, which takes 16,000 steps and more; else 0.0001
  where corrected moments have brought the copy near the float network (within 1 nat on the held-out images), 0.001 with
  Gaussian images, BatchNorm's statistics frozen in both cases, and 0.01 otherwise."""
  eval_data: str | None = None
  """Labelled images to evaluate on, used for nothing else: zip or folder of CLASS_*.jpg, class folders, .npz, tfds:NAME."""
  real_data: str | None = None
  """Real images to calibrate with as well, for comparison only; the same forms, FILE.npz:train picks a split."""
  class_names: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE")] = None
  """Names of the classes for the report, one a line, in the order of the logits. Default: class_names.txt in the folder of
  --network, if there is one."""
  tensorboard: bool = False
  """Write loss, J_KL, learning rate, images and protocol to WORKDIR/tensorboard as well (extra tensorboard)."""
  preset: Preset = "cpu"
  """cpu: minutes on two cores. paper: the published settings, for accelerators. smoke: the shortest complete run."""
  workdir: pathlib.Path | None = None
  """Where everything goes. Default: runs/EXPERIMENT-..., a folder of its own for every set of options."""
  resume: bool = True
  """Go on where an earlier run with the same options stopped; --no-resume starts over."""
  seed: int = 0
  """Seed of everything random."""
  devices: int | None = None
  """Devices of each process that the work is spread over. Default: all accelerators, or one a CPU core."""
  coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
  """Where process 0 of a run of several processes is reached. SLURM (srun), Open MPI and Cloud TPU need none of these three;
  see docs/many_devices.md."""
  num_processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
  """How many processes take part, each started with the same command but for --process-id."""
  process_id: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
  """Which of them this one is, from 0."""
  checkpoint_seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 20.0
  """Least time in seconds between two saved states of the synthesis: at most that much is lost to a kill."""
  checkpoint_steps: Annotated[int, tyro.conf.arg(metavar="N")] = 200
  """Fine-tuning steps between two saved states."""
  dry_run: bool = False
  """Say what would be done and what it would cost, and do nothing."""

  def first_last_bits(self) -> str | None:
    """--first-last, with `none` read as None."""
    return None if self.first_last in (None, "none") else self.first_last


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much of everything; what a preset fills in."""

  images: int
  held_out: int
  steps: int
  batch_size: int
  duplicates: int
  distill_steps: int
  distill_batch_size: int
  calibration_steps: int
  calibration_batch: int


_PRESETS: dict[tuple[str, bool], Sizes] = {
  # (preset, whether images are small): CIFAR-sized networks and ImageNet-sized ones
  ("cpu", True): Sizes(384, 128, 120, 128, 1, 120, 64, 200, 256),
  ("cpu", False): Sizes(40, 24, 60, 32, 1, 40, 16, 200, 256),
  ("paper", True): Sizes(500, 125, 1000, 800, 4, 16000, 256, 200, 256),
  ("paper", False): Sizes(10000, 2500, 1000, 80, 4, 44000, 256, 200, 256),
  ("smoke", True): Sizes(8, 2, 3, 10, 1, 2, 4, 2, 16),
  ("smoke", False): Sizes(3, 1, 2, 4, 1, 1, 2, 2, 16),
}


def check_numbers(options: Options) -> None:
  """Refuse numbers that would stop the run only when their stage begins.

  Raises:
    KwjaxError: naming the option and what it takes.
  """
  if not 0 <= options.seed < 1 << 32:
    raise KwjaxError(f"--seed must be at least 0 and below 2^32, found {options.seed}")
  if not 0 <= options.checkpoint_seconds < math.inf:
    raise KwjaxError(f"--checkpoint-seconds must be a number of at least 0, found {options.checkpoint_seconds}")
  if options.checkpoint_steps < 1:
    raise KwjaxError(f"--checkpoint-steps must be at least 1, found {options.checkpoint_steps}")
  rate = options.distill_learning_rate
  if rate is not None and not 0 < rate < math.inf:
    raise KwjaxError(f"--distill-learning-rate must be a positive number, found {rate}")


def sizes(options: Options, network: Network) -> Sizes:
  """What the preset says for this network, with the options that were given put in its place.

  Raises:
    KwjaxError: a number is out of range.
  """
  check_numbers(options)
  base = _PRESETS[options.preset, network.image_shape[0] <= 64]
  given = {
    field.name: value
    for field in dataclasses.fields(Sizes)
    if (value := getattr(options, field.name, None)) is not None
  }
  for name, value in given.items():
    least = 0 if name in ("distill_steps", "steps") else 1
    if value < least:
      raise KwjaxError(f"--{name.replace('_', '-')} must be at least {least}, found {value}")
  return dataclasses.replace(base, **given)


def synthesis_config(options: Options, network: Network, chosen: Sizes) -> SynthesisConfig:
  """Settings of the synthesis: published ones under --preset paper, else the project's defaults at the chosen size.

  Raises:
    KwjaxError: there are no published settings for this network's architecture.
  """
  if options.scheme == "gaussian":
    return SynthesisConfig.preset("gaussian")
  if options.preset == "paper":
    row = next((row for row in PAPER_ROWS if network.arch and row.startswith(network.arch + "_")), None)
    small, large = "resnet44_cifar10", "resnet18_imagenet"
    config = SynthesisConfig.preset(options.scheme, row or (small if network.image_shape[0] <= 64 else large))
    if options.steps is not None:
      config = config.with_steps(options.steps)
    changes = {name: value for name in ("batch_size", "duplicates") if (value := getattr(options, name)) is not None}
    return config.replace(**changes)
  config = SynthesisConfig.for_network(options.scheme, min(network.image_shape[:2]))
  config = config.with_steps(chosen.steps).replace(batch_size=chosen.batch_size, duplicates=chosen.duplicates)
  if not config.objective.needs_statistics and batch_norm_layers(network):
    # Scheme I does not optimize J_KL, but how it moves all the same is worth seeing.
    return config.replace(objective=dataclasses.replace(config.objective, monitor=("bns",)))
  return config


def class_names(options: Options, network: Network) -> list[str] | None:
  """Names of the network's classes, from --class-names or from `class_names.txt` in the folder of --network; or None.

  Raises:
    KwjaxError: the file cannot be read, is not text, has an empty line, or not one line a class.
  """
  path = options.class_names
  if path is None:
    path = options.network / "class_names.txt" if options.network is not None else None
    if path is None or not path.is_file():
      return None
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except OSError as error:
    raise KwjaxError(f"--class-names: {path} cannot be read: {error.strerror or error}") from error
  except UnicodeDecodeError as error:
    raise KwjaxError(f"--class-names: {path} is not UTF-8 text") from error
  names = [line.strip() for line in lines]
  empty = [number for number, name in enumerate(names, 1) if not name]
  if len(names) != network.num_classes:
    raise KwjaxError(
      f"--class-names: {path} has {len(names)} lines, but {network.name} has {network.num_classes} classes: one name a line"
    )
  if empty:
    raise KwjaxError(f"--class-names: line {empty[0]} of {path} is empty: one name a line")
  return names


def run_folder(name: str, options: Options, network: Network) -> pathlib.Path:
  """--workdir, or a folder whose name derives from everything that changes the result.

  The same command therefore resumes its own run, and another command never meets it.
  """
  if options.workdir is not None:
    return options.workdir
  digest = hashlib.sha256(canonical_json(result_settings(options, network)).encode()).hexdigest()[:8]
  return pathlib.Path("runs") / f"{name}-{network.name}-{options.scheme}-seed{options.seed}-{digest}"


def result_settings(options: Options, network: Network) -> dict[str, Any]:
  """The options that the results depend on."""
  without_effect = {
    "workdir",
    "resume",
    "dry_run",
    "network",
    "weights",
    "devices",
    "coordinator",
    "num_processes",
    "process_id",
    "checkpoint_seconds",
    "checkpoint_steps",
    "class_names",
    "tensorboard",
  }
  settings = {k: v for k, v in dataclasses.asdict(options).items() if k not in without_effect}
  data = {name: _content(settings[name]) for name in ("eval_data", "real_data")}
  return {**settings, "network": fingerprint(network), "data": data}


def _content(spec: str | None) -> str | None:
  """A checksum of the file that a data set is in, so that results on another content are not taken for its own."""
  path = pathlib.Path((spec or "").removesuffix(":train").removesuffix(":test"))
  return sha256_file(path)[:16] if spec and path.is_file() else None
