"""What a student is taught: the teacher's logits, and the outputs of its stages."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.errors import KwjaxError
from kwjax.runtime.devices import parallel

Array = jax.Array


def kl_divergence(
  student_logits: Array, teacher_logits: Array, *, temperature: float = 1.0, weights: Array | None = None
) -> Array:
  r"""$\frac{T^2}{b} \sum_i KL(softmax(t_i / T) \| softmax(s_i / T))$: mean over the batch, sum over the classes.

  The factor T^2 keeps the gradient's size when T changes: it is $\frac{T}{b}(softmax(s_i / T) - softmax(t_i / T))$.

  Args:
    student_logits: f32[b,k].
    teacher_logits: f32[b,k].
    temperature: T > 0; 1 compares the networks' own probabilities.
    weights: f32[b] for a weighted mean over the batch, or None.

  Returns:
    f32[], >= 0 up to rounding, zero iff the probabilities agree.

  Source: Hinton, Vinyals & Dean (2015), "Distilling the Knowledge in a Neural Network".
  """
  log_s = jax.nn.log_softmax(jnp.asarray(student_logits, jnp.float32) / temperature)
  log_t = jax.nn.log_softmax(jnp.asarray(teacher_logits, jnp.float32) / temperature)
  return temperature**2 * parallel.weighted_mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1), weights)


def soft_cross_entropy(
  student_logits: Array, teacher_logits: Array, *, temperature: float = 1.0, weights: Array | None = None
) -> Array:
  r"""$-\frac1b \sum_i softmax(t_i / T) \cdot \log softmax(s_i / T)$: mean over the batch, without the factor T^2.

  `kl_divergence` plus the entropy of the teacher, for T = 1; the same gradients for the student.

  Args:
    student_logits: f32[b,k].
    teacher_logits: f32[b,k].
    temperature: T > 0.
    weights: f32[b] for a weighted mean over the batch, or None.

  Returns:
    f32[].

  Source: the distillation loss of Raikwar & Mishra (2022), "Discovering and Overcoming Limitations of Noise-engineered
  Data-free Knowledge Distillation".
  """
  log_s = jax.nn.log_softmax(jnp.asarray(student_logits, jnp.float32) / temperature)
  t = jax.nn.softmax(jnp.asarray(teacher_logits, jnp.float32) / temperature)
  return -parallel.weighted_mean(jnp.sum(t * log_s, axis=-1), weights)


def smooth_l1(x: Array, y: Array, *, weights: Array | None = None) -> Array:
  """Mean over elements of d^2 / 2 where |d| < 1, else |d| - 1/2, with d = x - y; f32[]. PyTorch's SmoothL1Loss.

  Args:
    x: f32[b,...].
    y: f32[b,...].
    weights: f32[b] for a weighted mean over the first axis, or None.
  """
  d = jnp.abs(jnp.asarray(x, jnp.float32) - jnp.asarray(y, jnp.float32))
  return parallel.weighted_mean(jnp.where(d < 1.0, 0.5 * jnp.square(d), d - 0.5), weights)


def stage_losses(
  student_features: Mapping[str, Array],
  teacher_features: Mapping[str, Array],
  *,
  weights: Array | None = None,
  reduction: str = "mean",
) -> dict[str, Array]:
  """`smooth_l1` of each stage, in the order of the teacher's stages; `{stage: f32[]}`.

  Args:
    student_features: `{stage: f32[b,h,w,c]}`.
    teacher_features: the same stages of the teacher.
    weights: f32[b] of the images, or None. A stage with k times as many entries gives each weight to k consecutive ones.
    reduction: over the elements of a stage: "mean", or "sum", h w c times as much; always the mean over images.

  Raises:
    KwjaxError: the networks' stages differ in name or in shape, or a stage's leading axis does not fit the weights.
  """
  if set(student_features) != set(teacher_features):
    raise KwjaxError(f"student stages {sorted(student_features)} are not the teacher's {sorted(teacher_features)}")
  for stage, wanted in teacher_features.items():
    found = student_features[stage]
    if found.shape != wanted.shape:
      raise KwjaxError(f"stage {stage} has shape {wanted.shape} in the teacher and {found.shape} in the student")
  return {
    stage: smooth_l1(student_features[stage], value, weights=_entry_weights(stage, value, weights))
    * (float(np.prod(value.shape[1:])) if reduction == "sum" else 1.0)
    for stage, value in teacher_features.items()
  }


def _entry_weights(stage: str, value: Array, weights: Array | None) -> Array | None:
  if weights is None or value.shape[0] == weights.shape[0]:
    return weights
  if value.shape[0] % weights.shape[0]:
    raise KwjaxError(
      f"stage {stage} has shape {value.shape}, whose leading axis does not run over the {weights.shape[0]} images of a "
      "padded batch: use a batch size that is a multiple of the number of devices"
    )
  return jnp.repeat(weights, value.shape[0] // weights.shape[0])


def intermediate_loss(
  student_features: Mapping[str, Array], teacher_features: Mapping[str, Array], *, weights: Array | None = None
) -> Array:
  """Intermediate quantization loss IQ: `smooth_l1` of each stage, summed over the stages.

  Args:
    student_features: `{stage: f32[b,h,w,c]}`.
    teacher_features: the same stages of the teacher.
    weights: f32[b] of the images, or None.

  Returns:
    f32[]; zero without stages.

  Raises:
    KwjaxError: the networks' stages differ in name or in shape.

  Source: Haroush et al. (2020), "The Knowledge Within", Algorithm 2.
  """
  return sum(stage_losses(student_features, teacher_features, weights=weights).values(), jnp.float32(0.0))
