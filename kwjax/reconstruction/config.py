"""Settings of a reconstruction, and presets."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kwjax.errors import KwjaxError

# V travels about 2.4 from an undecided offset to a decided one. Adam moves it by its rate a step and not always one way.
_TRAVEL = 6.0
_LEAST_RATE = 1e-3
# Where they decide only what memory holds or when the host looks; a run may be resumed with others.
_WITHOUT_EFFECT = ("log_every", "resident_bytes", "host_bytes")


@dataclasses.dataclass(frozen=True)
class ReconstructConfig:
  """How each unit is reconstructed; loss = error + regularizer * sum(1 - |2 h(V) - 1|^beta).

  Attributes:
    iterations: Adam steps of each unit.
    batch_size: images a step, over all devices.
    rounding_rate: of V. None: what lets an offset travel from 1/2 to an end in `iterations`, and at least the published 1e-3.
    step_rate: of the logarithm of an activation step, with a cosine to 0; 0 keeps the calibrated ranges.
    scale_rate: of the logarithm of weight scales, with a cosine to 0; 0 keeps them (Genie-M trains them).
    regularizer: weight lambda of the term that decides the offsets.
    warmup: share of the iterations without this term.
    beta_start: its exponent at the end of the warm-up.
    beta_end: its exponent at the last iteration; between, it is linear.
    keep: probability that an element of an input keeps its float value (QDrop); 0 for none.
    fisher: whether the channels of a unit's output are weighted by the squared gradient of the KL between the student's
      logits and the float network's.
    units: paths or regular expressions of layers; neighbouring units whose layers all match one are joined.
    log_every: iterations between two looks at the loss.
    resident_bytes: features of a unit up to this size are held on the devices (the sum of their copies), larger ones on the
      host.
    host_bytes: features beyond this size are kept in files. None: half of the memory that is left.
  """

  iterations: int = 200
  batch_size: int = 32
  rounding_rate: float | None = None
  step_rate: float = 1e-3
  scale_rate: float = 1e-3
  regularizer: float = 0.02
  warmup: float = 0.2
  beta_start: float = 20.0
  beta_end: float = 2.0
  keep: float = 0.5
  fisher: bool = False
  units: tuple[str, ...] = ()
  log_every: int = 25
  resident_bytes: int = 2 << 30
  host_bytes: int | None = None

  def __post_init__(self) -> None:
    object.__setattr__(self, "units", tuple(self.units))
    for name in ("iterations", "batch_size", "log_every"):
      if getattr(self, name) < 1:
        raise KwjaxError(f"{name} must be at least 1, found {getattr(self, name)}")
    for name in ("step_rate", "scale_rate", "regularizer"):
      if not getattr(self, name) >= 0.0:
        raise KwjaxError(f"{name} must not be negative, found {getattr(self, name)}")
    for name in ("warmup", "keep"):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise KwjaxError(f"{name} must be at least 0 and below 1, found {getattr(self, name)}")
    if not self.beta_start >= self.beta_end > 0.0:
      raise KwjaxError(f"beta_start must be at least beta_end, and both positive: {self.beta_start}, {self.beta_end}")
    if self.rounding_rate is not None and not self.rounding_rate > 0.0:
      raise KwjaxError(f"rounding_rate must be positive, found {self.rounding_rate}")

  @classmethod
  def preset(cls, name: str, **changes: Any) -> ReconstructConfig:
    """Settings by name; `changes` replace fields.

    - "fast": 200 iterations a unit.
    - "published": 20,000 iterations, lambda 0.01, activation steps at 4e-5, weight scales as they are; Wei et al. (2022), the
      released code.

    Raises:
      KwjaxError: the name is unknown.
    """
    presets: dict[str, dict[str, Any]] = {
      "fast": {},
      "published": {
        "iterations": 20_000,
        "regularizer": 0.01,
        "step_rate": 4e-5,
        "rounding_rate": 1e-3,
        "scale_rate": 0.0,
      },
    }
    if name not in presets:
      raise KwjaxError(f"unknown preset {name!r}; known: {', '.join(presets)}")
    return cls(**{**presets[name], **changes})

  def replace(self, **changes: Any) -> ReconstructConfig:
    """The same with some fields changed."""
    return dataclasses.replace(self, **changes)

  def to_json(self) -> dict[str, Any]:
    """Everything that the result depends on."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {name: value for name, value in fields.items() if name not in _WITHOUT_EFFECT} | {"units": list(self.units)}

  def rates_at(self, step: jax.Array) -> dict[str, jax.Array | float]:
    """Learning rate f32[] of each kind of parameter."""
    rounding = max(_TRAVEL / self.iterations, _LEAST_RATE) if self.rounding_rate is None else self.rounding_rate
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * step / self.iterations))
    return {"v": rounding, "log_step": self.step_rate * cosine, "log_scale": self.scale_rate * cosine}

  def regularizer_at(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weight f32[] of the regularizer and its exponent f32[]."""
    begin = self.warmup * self.iterations
    progress = jnp.clip((step - begin) / (self.iterations - begin), 0.0, 1.0)
    beta = self.beta_start + (self.beta_end - self.beta_start) * progress
    return jnp.where(step < begin, 0.0, self.regularizer), beta
