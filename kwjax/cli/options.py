"""Command-line options of the main job, and what they mean for `kwjax.compress`."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from kwjax.compression.plan import parse_rules
from kwjax.compression.settings import PUBLISHED, FineTuning, Preset, Sizes, sizes_for, synthesis_config
from kwjax.errors import KwjaxError
from kwjax.network import Network
from kwjax.quantization import QuantRules
from kwjax.quantization.methods import METHODS, Method
from kwjax.reconstruction import ReconstructConfig
from kwjax.synthesis import SynthesisConfig

ByPreset = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: by --preset)")]
REMEDY = "choose a smaller --batch-size, --distill-batch-size or --images, or fewer --duplicates"
Scheme = Literal["bns", "inception", "bns+inception", "deepinversion", "gaussian"]


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
  """Precisions to calibrate, each #w#a; the last one named is saved, and fine-tuned if it is far from the float network."""
  first_last: str | None = "8w8a"
  """Precision of the first convolution and of the classifier; `none` treats them like the rest."""
  overrides: tuple[str, ...] = ()
  """Exceptions to --bits, each PATTERN=BITS: a layer path, a regular expression, or `1x1` (1x1=8w8a)."""
  weight_scheme: Literal["integer", "auto", "affine", "affine0", "sym", "symfull", "midrise"] | None = None
  """Grid of the weights. integer: affine0 from 4 bits on, midrise below; such students are saved and exported as integers. auto:
  affine instead of affine0, the paper's, which has no integer form. Default: auto under --calibration paper, else integer."""
  calibration: Literal["best", "paper"] | None = None
  """best: what made the best students without data (docs/accuracy.md): ranges of least squared error, of activations below 8
  bits only, and the moments of all channels brought back to the float network's, unless held-out images speak against it.
  paper: extremes alone. Default: paper under --preset paper, else best."""
  range_method: Literal["sample", "chunk", "percentile", "mse", "entropy"] | None = None
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
  views: int = 1
  """Views of each synthetic image to calibrate and reconstruct with. The first is the image itself. More are drawn as in the
  synthesis; they help some networks and harm others."""
  steps: ByPreset = None
  """Optimization steps a batch."""
  batch_size: ByPreset = None
  """Images optimized together."""
  duplicates: ByPreset = None
  """Independently augmented copies of each image in a step."""
  reconstruct_iterations: ByPreset = None
  """Iterations of the reconstruction of each block, for precisions below 8 bits; 0 leaves it out, as the preset cpu does for
  images beyond 64 pixels."""
  reconstruct_batch_size: ByPreset = None
  """Images in each of them."""
  distill_steps: ByPreset = None
  """SGD steps of the fine-tuning, which a reconstructed student near the float network does not need; 0 leaves it out."""
  distill_batch_size: ByPreset = None
  """Images a fine-tuning step."""
  distill_learning_rate: float | None = None
  """Peak learning rate of the fine-tuning. Default: 0.1 under --preset paper, which takes 16,000 steps and more; else 0.0001
  where corrected moments have brought the student near the float network (within 1 nat on the held-out images), 0.001 with
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
  if options.views < 1:
    raise KwjaxError(f"--views must be at least 1, found {options.views}")
  rate = options.distill_learning_rate
  if rate is not None and not 0 < rate < math.inf:
    raise KwjaxError(f"--distill-learning-rate must be a positive number, found {rate}")


def option_name(field: str) -> str:
  """What a field is called on the command line."""
  return f"--{field.replace('_', '-')}"


def sizes(options: Options, network: Network) -> Sizes:
  """What the preset says for this network, with the options that were given put in its place.

  Raises:
    KwjaxError: a number is out of range.
  """
  check_numbers(options)
  return sizes_for(network, options.preset, _given(options, Sizes), spell=option_name)


def config_of(options: Options, network: Network, chosen: Sizes) -> SynthesisConfig:
  """Settings of the synthesis: published ones under --preset paper, else the project's defaults at the chosen size.

  Raises:
    KwjaxError: there are no published settings for this network's architecture.
  """
  given = {name: n for name, n in _given(options, Sizes).items() if name in ("steps", "batch_size", "duplicates")}
  return synthesis_config(network, options.scheme, chosen, preset=options.preset, given=given)


def fine_tuning_of(options: Options, chosen: Sizes) -> FineTuning:
  """Settings of the fine-tuning, as far as the command line decides them."""
  published = options.preset == PUBLISHED
  return FineTuning(
    chosen.distill_steps,
    chosen.distill_batch_size,
    options.distill_learning_rate,
    published=published,
    scales_warmup=not published or options.distill_steps is not None,
  )


def reconstruction_of(chosen: Sizes) -> ReconstructConfig | bool:
  """Settings of the reconstruction; False for none."""
  if chosen.reconstruct_iterations == 0:
    return False
  return ReconstructConfig(iterations=chosen.reconstruct_iterations, batch_size=chosen.reconstruct_batch_size)


def calibration_of(options: Options) -> str:
  """--calibration, by default the paper's under --preset paper, else the best."""
  return options.calibration or ("paper" if options.preset == PUBLISHED else "best")


def weight_scheme_of(options: Options) -> str:
  """--weight-scheme, by default the paper's where its calibration is taken, else one that integer kernels can run."""
  return options.weight_scheme or ("auto" if calibration_of(options) == "paper" else "integer")


def method_of(options: Options, chosen: Sizes | None = None) -> Method:
  """What --calibration says, with the options that were given put in its place.

  Args:
    options: the command line.
    chosen: numbers of draws; None: those of the method.
  """
  correction = options.correction
  given: dict[str, Any] = {
    "ranges": options.range_method,
    "weights_range": options.weight_range,
    "corrects_bias": None if correction is None else correction != "none",
    "corrects_variance": None if correction is None else correction == "moments",
    "chooses": None if correction is None else False,
    "equalizes": options.equalize,
    "steps": chosen and chosen.calibration_steps,
    "batch_size": chosen and chosen.calibration_batch,
  }
  return METHODS[calibration_of(options)]._replace(**{name: v for name, v in given.items() if v is not None})


def overrides_of(texts: Sequence[str]) -> list[tuple[str, str]]:
  """The texts of --overrides as pairs of a pattern and bits.

  Raises:
    KwjaxError: one does not have that form.
  """
  found = []
  for text in texts:
    pattern, separator, bits = text.rpartition("=")
    if not separator:
      raise KwjaxError(f"--overrides takes PATTERN=BITS such as 1x1=8w8a, found {text!r}")
    found.append((pattern, bits))
  return found


def rules_of(options: Options, network: Network) -> dict[str, QuantRules]:
  """Rules of every requested precision, checked against the network's layers.

  Raises:
    KwjaxError: no precision is given, one is malformed or given twice.
  """
  return parse_rules(
    network,
    options.bits,
    method=method_of(options),
    first_last=options.first_last_bits(),
    overrides=overrides_of(options.overrides),
    weights=weight_scheme_of(options),
  )


def _given(options: Options, fields_of: type) -> dict[str, int]:
  """The options that were given among the fields of a dataclass."""
  found = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(fields_of)}
  return {name: value for name, value in found.items() if value is not None}
