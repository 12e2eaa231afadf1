"""Settings of a synthesis run, and the published settings as presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import optax

from kwjax.errors import KwjaxError
from kwjax.synthesis.augment import Augmentation
from kwjax.synthesis.objective import Objective

SCHEMES = ("bns", "inception", "bns+inception", "gaussian", "deepinversion")


@dataclasses.dataclass(frozen=True)
class SynthesisConfig:
  """Settings of a synthesis. `for_network` gives the best settings measured, `preset` the published ones.

  Attributes:
    scheme: "bns", "inception", "bns+inception", "deepinversion", "gaussian" or your own. It is the name in reports;
      `objective` defines what is optimized. "gaussian" draws noise and optimizes nothing.
    objective: terms and weights.
    augmentation: drawn anew for each view at each step.
    steps: Adam steps.
    batch_size: images optimized together; statistics are over all their views and all devices.
    duplicates: number of views of each image in a step.
    learning_rate: Adam's, in pixel units of [0,1].
    schedule: "drops": multiply the learning rate by `drop_factor` at each step in `drops`; "cosine": decay it to zero
      along a cosine.
    drops: steps of the schedule "drops".
    drop_factor: factor of the schedule "drops".
    betas: Adam's decay rates.
    init: starting point: "randn", "uniform" or "dead_leaves".
    labels: target classes for the terms that use them: "random", or "balanced" over the whole set.
    swing: strided convolutions see their input from a random offset at each step (Jeon et al., 2023).
  """

  scheme: str = "bns"
  objective: Objective = dataclasses.field(default_factory=Objective)
  augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
  steps: int = 200
  batch_size: int = 128
  duplicates: int = 2
  learning_rate: float = 0.1
  schedule: Literal["drops", "cosine"] = "drops"
  drops: tuple[int, ...] = ()
  drop_factor: float = 0.1
  betas: tuple[float, float] = (0.9, 0.999)
  init: Literal["randn", "uniform", "dead_leaves"] = "randn"
  labels: Literal["random", "balanced"] = "balanced"
  swing: bool = False

  def __post_init__(self) -> None:
    for name in ("drops", "betas"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if self.scheme not in (*SCHEMES, *OWN_SCHEMES):
      raise KwjaxError(f"unknown scheme {self.scheme!r}; known: {', '.join((*SCHEMES, *OWN_SCHEMES))}")
    if self.init not in ("randn", "uniform", "dead_leaves"):
      raise KwjaxError(f"unknown init {self.init!r}; known: randn, uniform, dead_leaves")
    if self.labels not in ("random", "balanced"):
      raise KwjaxError(f"unknown labels {self.labels!r}; known: random, balanced")
    if self.schedule not in ("drops", "cosine"):
      raise KwjaxError(f"unknown schedule {self.schedule!r}; known: drops, cosine")
    for name in ("batch_size", "duplicates"):
      if getattr(self, name) < 1:
        raise KwjaxError(f"{name} must be at least 1, found {getattr(self, name)}")
    if self.steps < 0 or self.learning_rate <= 0:
      raise KwjaxError(f"steps must be >= 0 and learning_rate > 0, found {self.steps} and {self.learning_rate}")

  @property
  def is_optimized(self) -> bool:
    """Whether pixels are optimized; the Gaussian scheme only draws them."""
    return self.scheme != "gaussian"

  def learning_rate_at(self) -> optax.Schedule:
    """The schedule as a function from step to learning rate."""
    if self.schedule == "cosine":
      return optax.cosine_decay_schedule(self.learning_rate, max(self.steps, 1))
    return optax.piecewise_constant_schedule(self.learning_rate, dict.fromkeys(self.drops, self.drop_factor))

  def replace(self, **changes: Any) -> SynthesisConfig:
    """The same settings with some fields changed."""
    return dataclasses.replace(self, **changes)

  def with_steps(self, steps: int) -> SynthesisConfig:
    """The same settings with another number of steps; drops keep their relative place."""
    drops = tuple(sorted({max(1, round(drop * steps / self.steps)) for drop in self.drops})) if self.steps else ()
    return self.replace(steps=steps, drops=drops)

  def to_json(self) -> dict[str, Any]:
    """All settings as JSON-able values; your own terms by name."""
    settings = dataclasses.asdict(dataclasses.replace(self, objective=dataclasses.replace(self.objective, extra=())))
    settings["objective"]["extra"] = [[name, weight] for name, weight, _ in self.objective.extra]
    return settings

  @classmethod
  def for_network(cls, scheme: str, image_size: int) -> SynthesisConfig:
    """Defaults for a scheme: the best settings measured within a few hundred steps.

    They differ from the published settings:

    - The images start from dead leaves instead of noise.
    - The schedule is a cosine instead of drops.
    - The divergence is log(1 + KL). A few rarely active channels of networks with ReLU6 would outweigh all others.
    - Each image has one view. Every further view costs as much time again.
    - Large images use a random resized crop and flip.
    - Small images use a flip and a crop with one pixel of zero padding in 32. This is less than in training, so the images
      themselves get the right statistics, not only their views. They are not resized, as that hides pixel noise.

    Args:
      scheme: "bns", "inception", "bns+inception", "deepinversion", "gaussian", or a key of OWN_SCHEMES.
      image_size: shorter side of the images in pixels.

    Raises:
      KwjaxError: unknown scheme.
    """
    if scheme in OWN_SCHEMES:
      return OWN_SCHEMES[scheme](image_size)
    base = cls.preset(scheme)
    if scheme == "gaussian":
      return base
    small = image_size <= 64
    is_kl = base.objective.divergence == "gaussian_kl"
    return base.replace(
      objective=dataclasses.replace(base.objective, divergence="log_gaussian_kl") if is_kl else base.objective,
      steps=200,
      schedule="cosine",
      drops=(),
      learning_rate=0.1 if small else 0.01,
      batch_size=128 if small else 32,
      duplicates=1,
      augmentation=_gentle(image_size) if small else Augmentation.training(image_size),
      init="dead_leaves",
      labels="balanced",
    )

  @classmethod
  def preset(cls, scheme: str, arch: str = "resnet44_cifar10") -> SynthesisConfig:
    """Published settings: Haroush et al. (2020), Appendix A.1; Yin et al. (2020) for "deepinversion" on CIFAR-10.

    Args:
      scheme: one of SCHEMES.
      arch: a row of Appendix A.1: one of PAPER_ROWS.

    Raises:
      KwjaxError: unknown scheme or row, with the known ones.
    """
    if scheme not in SCHEMES:
      raise KwjaxError(f"unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    if scheme == "gaussian":
      return cls(scheme=scheme, steps=0)
    if scheme == "deepinversion":
      return _deepinversion()
    if arch not in PAPER_ROWS:
      raise KwjaxError(f"no published settings for {arch!r}; known: {', '.join(PAPER_ROWS)}")
    batch_size, duplicates, large = PAPER_ROWS[arch]
    steps, drops, (bns, inception, smoothness) = (_LARGE if large else _SMALL)[scheme]
    return cls(
      scheme=scheme,
      objective=Objective(bns=bns, inception=inception, smoothness=smoothness),
      augmentation=Augmentation.paper(),
      steps=steps,
      drops=drops,
      batch_size=batch_size,
      duplicates=duplicates,
      labels="random",
    )


OWN_SCHEMES: dict[str, Callable[[int], SynthesisConfig]] = {}
"""Your own schemes for `for_network`: `{name: function of the shorter image side in pixels}`."""


def _gentle(image_size: int) -> Augmentation:
  return Augmentation(pad_crop=max(1, image_size // 32), flip=True)


# Row: (batch size, views, whether it follows the long schedules).
PAPER_ROWS: dict[str, tuple[int, int, bool]] = {
  "resnet44_cifar10": (800, 4, False),
  "wrn28_10_cifar100": (256, 4, False),
  "resnet18_imagenet": (80, 4, False),
  "mobilenet_v2_imagenet": (400, 2, True),
  "densenet121_imagenet": (200, 2, True),
}

# Scheme: (steps, drops, (alpha, beta, gamma)).
_Schedules = dict[str, tuple[int, tuple[int, ...], tuple[float, float, float]]]
_SMALL: _Schedules = {
  "bns": (1000, (800,), (1.0, 0.0, 0.0)),
  "bns+inception": (1000, (800,), (1.0, 1e-3, 1.0)),
  "inception": (1000, (800,), (0.0, 1e-3, 1.0)),
}
_LARGE: _Schedules = {
  "bns": (6000, (1500, 4200), (1.0, 0.0, 0.0)),
  "bns+inception": (10000, (1500, 6000), (1.0, 1e-4, 0.0)),
  "inception": (1000, (800,), (0.0, 1e-4, 1.0)),
}


def _deepinversion() -> SynthesisConfig:
  objective = Objective(
    bns=10.0,
    cross_entropy=1.0,
    total_variation=2.5e-5,
    divergence="moment_l2",
    layer_sum=True,
    include_input=False,
  )
  return SynthesisConfig(
    scheme="deepinversion",
    objective=objective,
    augmentation=Augmentation(pad_crop=2),
    steps=2000,
    batch_size=256,
    duplicates=1,
    learning_rate=0.05,
  )
