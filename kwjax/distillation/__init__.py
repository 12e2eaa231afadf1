"""Algorithm 2: train a student to agree with its teacher, on images alone."""

from kwjax.distillation.batches import Plan, assemble, planner
from kwjax.distillation.config import Augment, DistillConfig
from kwjax.distillation.features import recorded_features, recording_features, resolve_stages, stage_outputs
from kwjax.distillation.losses import intermediate_loss, kl_divergence, smooth_l1, soft_cross_entropy, stage_losses
from kwjax.distillation.mixup import Mixing, Mixup, draw_mixing, mix
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

__all__ = [
  "Augment",
  "DistillConfig",
  "DistillState",
  "Mixing",
  "Mixup",
  "Plan",
  "Trainable",
  "assemble",
  "distill",
  "distill_loss",
  "distill_step",
  "distill_with_history",
  "draw_mixing",
  "initial_state",
  "intermediate_loss",
  "kl_divergence",
  "mix",
  "planner",
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
