"""Algorithm 2: train a student to agree with its teacher, on images alone."""

from kwjax.distillation.config import DistillConfig
from kwjax.distillation.features import recorded_features, recording_features, resolve_stages, stage_outputs
from kwjax.distillation.losses import intermediate_loss, kl_divergence, smooth_l1, soft_cross_entropy, stage_losses
from kwjax.distillation.step import (
  DistillState,
  Trainable,
  distill_loss,
  distill_step,
  initial_state,
  updated_statistics,
  watched_terms,
)
from kwjax.distillation.train import distill, distill_with_history
from kwjax.sources.mixup import Mixup

__all__ = [
  "DistillConfig",
  "DistillState",
  "Mixup",
  "Trainable",
  "distill",
  "distill_loss",
  "distill_step",
  "distill_with_history",
  "initial_state",
  "intermediate_loss",
  "kl_divergence",
  "recorded_features",
  "recording_features",
  "resolve_stages",
  "smooth_l1",
  "soft_cross_entropy",
  "stage_losses",
  "stage_outputs",
  "updated_statistics",
  "watched_terms",
]
