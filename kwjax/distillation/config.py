"""Settings of a distillation run, and the published settings as presets."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from kwjax.errors import KwjaxError
from kwjax.sources.base import described
from kwjax.sources.mixup import Mixup
from kwjax.sources.plan import Augment

Schedule = Literal["cosine", "constant", "plateau"]
SCHEDULES = typing.get_args(Schedule)

# Where they decide only when the host looks or what memory holds; a run may be resumed with others.
_WITHOUT_EFFECT = ("log_every", "checkpoint_every", "resident_bytes")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """How a student is trained; loss = kl_weight * KL + iq_weight * IQ + target_weight * CE.

  Attributes:
    steps: SGD steps.
    batch_size: images a step, over all devices.
    learning_rate: its peak, after the warm-up. 0.1 is published for 16,000 steps and more; 0.01 suits a few hundred, 0.001
      Adam.
    algorithm: "sgd" or "adam".
    momentum: of SGD.
    nesterov: whether the momentum is Nesterov's.
    weight_decay: L2 penalty on all parameters, added to the gradient before the momentum.
    warmup_steps: steps of linear warm-up; the schedule takes the rest.
    schedule: "cosine" to zero at the last step; "constant"; or "plateau": the rate is multiplied by `plateau_factor`
      whenever the loss of the distillation, and nothing else, has stopped falling.
    plateau_factor: in (0, 1); with the other two, those of Raikwar & Mishra (2022), whose scheduler is PyTorch's.
    plateau_patience: averages in a row without a new lowest one (by 1e-4 of it) that are tolerated; the next such one
      cuts the rate.
    plateau_steps: steps whose mean loss is one average.
    temperature: T of `kl_divergence`.
    kl_weight: alpha of Algorithm 2.
    iq_weight: beta of Algorithm 2; 0 leaves the stages out.
    iq_reduction: over the elements of a stage, "mean" or "sum". With the mean the published weight of 1e-3 has 4e-5 of the
      length of KL's gradient and no effect; with the sum ResNet-20 at 2w4a on 100 images gains 13 points in 300 steps.
    stages: modules whose outputs IQ compares; None: those of `stage_outputs`, if there are any. A stage is a group of
      residual blocks of one spatial size, named by its last block.
    target_weight: weight of the cross-entropy of the student to the targets that came with the images; 0 leaves them out.
    mixup: how the images of a set are mixed, or None; a `Source` says itself what it draws.
    batch_norm: "train": the student normalizes with the statistics of the batch over all devices, and its running ones
      follow with each layer's own momentum. "frozen": it normalizes with the running ones, which stay as they are; the
      paper's choice for Gaussian images, whose statistics are not those of the data. Gradients are then far larger: a
      ResNet-20 at 2w4a learns at 0.01 with "train", collapses at 0.01 and learns at 0.001 with "frozen".
    current: paths or regular expressions of the teacher's BatchNorm layers that use the statistics of the batch over all
      devices instead of their running ones; (".*",) is what distillation from noise needs, see `current_layers`.
    augment: applied to each image of a set before mixing, or None; a function that is a module's attribute, so that a
      resumed run can tell that it is the same one. None for a `Source`.
    log_every: steps between two looks at the metrics; the host waits for the device there only.
    checkpoint_every: steps between checkpoints, where there is a working folder.
    resident_bytes: image sets up to this size are held on the devices (the sum of their copies), larger ones on
      the host.
  """

  steps: int
  batch_size: int = 256
  learning_rate: float = 0.1
  algorithm: Literal["sgd", "adam"] = "sgd"
  momentum: float = 0.9
  nesterov: bool = False
  weight_decay: float = 0.0
  warmup_steps: int = 0
  schedule: Schedule = "cosine"
  plateau_factor: float = 0.1
  plateau_patience: int = 10
  plateau_steps: int = 196
  temperature: float = 1.0
  kl_weight: float = 1.0
  iq_weight: float = 1e-3
  iq_reduction: Literal["mean", "sum"] = "mean"
  stages: tuple[str, ...] | None = None
  target_weight: float = 0.0
  mixup: Mixup | None = None
  batch_norm: Literal["train", "frozen"] = "train"
  current: tuple[str, ...] = ()
  augment: Augment | None = None
  log_every: int = 10
  checkpoint_every: int = 200
  resident_bytes: int = 2 << 30

  def __post_init__(self) -> None:
    if self.stages is not None:
      object.__setattr__(self, "stages", tuple(self.stages))
    object.__setattr__(self, "current", tuple(self.current))
    for name in ("batch_size", "plateau_steps", "log_every", "checkpoint_every"):
      if getattr(self, name) < 1:
        raise KwjaxError(f"{name} must be at least 1, found {getattr(self, name)}")
    if self.steps < 0 or not 0 <= self.warmup_steps <= self.steps:
      raise KwjaxError(f"warmup_steps must lie between 0 and steps, found {self.warmup_steps} of {self.steps} steps")
    for name in ("learning_rate", "temperature"):
      if not getattr(self, name) > 0.0:
        raise KwjaxError(f"{name} must be positive, found {getattr(self, name)}")
    if not 0.0 < self.plateau_factor < 1.0:
      raise KwjaxError(f"plateau_factor must lie between 0 and 1, found {self.plateau_factor}")
    for name in ("kl_weight", "iq_weight", "target_weight", "weight_decay", "momentum", "plateau_patience"):
      if not getattr(self, name) >= 0.0:
        raise KwjaxError(f"{name} must not be negative, found {getattr(self, name)}")
    if self.kl_weight == self.iq_weight == self.target_weight == 0.0:
      raise KwjaxError("kl_weight, iq_weight and target_weight are all 0: there is nothing to learn from")
    if self.batch_norm not in ("train", "frozen"):
      raise KwjaxError(f"unknown batch_norm {self.batch_norm!r}; known: train, frozen")
    if self.iq_reduction not in ("mean", "sum"):
      raise KwjaxError(f"unknown iq_reduction {self.iq_reduction!r}; known: mean, sum")
    if self.algorithm not in ("sgd", "adam"):
      raise KwjaxError(f"unknown algorithm {self.algorithm!r}; known: sgd, adam")
    if self.schedule not in SCHEDULES:
      raise KwjaxError(f"unknown schedule {self.schedule!r}; known: {', '.join(SCHEDULES)}")

  @classmethod
  def preset(cls, name: str, **changes: Any) -> DistillConfig:
    """Published settings, or those measured to suit a short run; `changes` replace fields.

    - "cifar": 16,000 steps (80 epochs of 200), batch 256, learning rate 0.1, IQ weight 1e-3 of a sum, mixup 0.5; Haroush
      et al. (2020), section 4.2 and appendix.
    - "imagenet": 44,000 steps (110 epochs of 400), IQ weight 1e-2 (the appendix; section 4.2 says 1e-3).
    - "noise": Adam at 0.001, a tenth of it whenever the loss of 11 epochs has brought no new lowest one, batch 256, every
      BatchNorm layer of the teacher on the statistics of the batch, no IQ; Raikwar & Mishra (2022), who take 196 steps
      an epoch for 200 epochs.
    - "short": 200 steps of 128, learning rate 0.01, no IQ and no mixup. On small images `iq_weight=1e-2, iq_reduction="sum"` is
      worth ten points at 2 bits (ResNet-20, 380 BNS images, 120 steps: 75.32 and 86.14 %); mixup does not pay before some
      thousand steps.

    The paper's "short warm-up" is read as one epoch.

    Raises:
      KwjaxError: there is no such preset.
    """
    if name not in _PRESETS:
      raise KwjaxError(f"unknown preset {name!r}; known: {', '.join(_PRESETS)}")
    return cls(**{**_PRESETS[name], **changes})

  def replace(self, **changes: Any) -> DistillConfig:
    """A copy with some fields changed."""
    return dataclasses.replace(self, **changes)

  def learning_rate_at(self) -> optax.Schedule:
    """Step -> learning rate, before the cuts of `plateau_scale`: that of `warmup_cosine`, or constant after the warm-up."""
    if self.schedule == "cosine":
      return warmup_cosine(self.learning_rate, self.steps, self.warmup_steps)
    return warmup_constant(self.learning_rate, self.warmup_steps)

  def optimizer(self) -> optax.GradientTransformationExtraArgs:
    """SGD: v <- momentum v + g + weight_decay w;  w <- w - lr v, as PyTorch's; or Adam with its usual constants.

    Its update takes the loss as `value`, which the plateau watches: f32[], the same on every device.
    """
    if self.algorithm == "adam":
      rule = optax.adam(self.learning_rate_at())
    else:
      rule = optax.sgd(self.learning_rate_at(), momentum=self.momentum or None, nesterov=self.nesterov)
    rule = optax.chain(optax.add_decayed_weights(self.weight_decay), rule) if self.weight_decay else rule
    if self.schedule != "plateau":
      return optax.with_extra_args_support(rule)
    # optax cuts at the average that reaches its patience, PyTorch at the one that exceeds it.
    watch = optax.contrib.reduce_on_plateau(
      self.plateau_factor, self.plateau_patience + 1, accumulation_size=self.plateau_steps
    )
    return optax.chain(rule, watch)

  def plateau_scale(self, state: optax.OptState) -> jax.Array:
    """What the cuts so far have made of the learning rate, f32[]: a power of `plateau_factor`; 1 for other schedules.

    Args:
      state: of `optimizer`, after an update: the scale that this update was made with.
    """
    if self.schedule != "plateau":
      return jnp.float32(1.0)
    assert isinstance(state, tuple)
    return jnp.asarray(state[-1].scale, jnp.float32)

  def to_json(self) -> dict[str, Any]:
    """The settings that decide the result, JSON-able; functions by name."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _WITHOUT_EFFECT}
    fields["mixup"] = None if self.mixup is None else dataclasses.asdict(self.mixup)
    fields["augment"] = described(self.augment)
    return fields


def warmup_cosine(peak: float, steps: int, warmup_steps: int) -> optax.Schedule:
  """Step -> learning rate: linear to the peak, reached at step `warmup_steps`, then a cosine to zero at step `steps`.

  lr(t) = peak (t + 1) / (w + 1) for t < w, and peak (1 + cos(pi (t - w) / (steps - w))) / 2 from t = w on. The
  warm-up starts above zero, so that the first step is not lost.
  """
  cosine = optax.cosine_decay_schedule(peak, max(steps - warmup_steps, 1))
  if warmup_steps == 0:
    return cosine
  warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
  return optax.join_schedules([warmup, cosine], [warmup_steps])


def warmup_constant(peak: float, warmup_steps: int) -> optax.Schedule:
  """Step -> learning rate: peak (t + 1) / (w + 1) for t < w, as in `warmup_cosine`, and the peak from t = w on."""
  return optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)


_PAPER = {"batch_size": 256, "learning_rate": 0.1, "mixup": Mixup(lam=0.5)}
_PRESETS: Mapping[str, Mapping[str, Any]] = {
  "cifar": {**_PAPER, "steps": 16_000, "warmup_steps": 200, "iq_weight": 1e-3, "iq_reduction": "sum"},
  "imagenet": {**_PAPER, "steps": 44_000, "warmup_steps": 400, "iq_weight": 1e-2},
  "noise": {
    "steps": 39_200,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "algorithm": "adam",
    "schedule": "plateau",
    "iq_weight": 0.0,
    "current": (".*",),
  },
  "short": {"steps": 200, "batch_size": 128, "learning_rate": 0.01, "iq_weight": 0.0},
}
