"""Algorithm 2: one step of training a student on a batch; pure, for one device and for many.

A stage is a group of residual blocks of one spatial size, whose output feature maps are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from kwjax import intercept
from kwjax.batchnorm import observing, recorded_moments, weigh
from kwjax.batchnorm.normalize import running_moments
from kwjax.distillation.config import DistillConfig
from kwjax.distillation.features import recorded_features, recording_features, resolve_stages
from kwjax.distillation.losses import kl_divergence, stage_losses
from kwjax.errors import KwjaxError
from kwjax.intercept import Forwardable
from kwjax.kernels import fewer_products
from kwjax.network import ApplyFn, Array, Variables
from kwjax.runtime.devices import parallel

_MOMENTUM = "momentum"


class Trainable(Forwardable, Protocol):
  """A network that can be rebuilt with other variables: `Network`, `QuantizedNetwork`."""

  def replace(self, **changes: Any) -> Any:
    """A copy with some fields changed."""
    ...


Student = TypeVar("Student", bound=Trainable)


class DistillState(NamedTuple, Generic[Student]):
  """A student in training.

  Attributes:
    step: i32[], steps done.
    student: with its current variables.
    optimizer: momentum of every parameter, the step of the schedule, and what the plateau has seen of the loss.
    bad_step: i32[], the first step at which a term was not finite, or -1. Kept here so that no step waits for the host.
    bad_term: i32[], which term it was, an index into `watched_terms`.
  """

  step: Array
  student: Student
  optimizer: optax.OptState
  bad_step: Array
  bad_term: Array


class HasOptimizer(Protocol):
  """A configuration that says how parameters are updated."""

  def optimizer(self) -> optax.GradientTransformation:
    """Of the gradient of all parameters."""
    ...


def initial_state(student: Student, config: HasOptimizer) -> DistillState[Student]:
  """State before the first step; it holds copies, because a step may reuse the memory of the state it is given."""
  student = jax.tree.map(jnp.array, student)
  optimizer = config.optimizer().init(student.variables["params"])
  return DistillState(jnp.int32(0), student, optimizer, jnp.int32(-1), jnp.int32(0))


def next_state(
  state: DistillState[Student],
  config: HasOptimizer,
  loss: Array,
  gradient: Any,
  batch_stats: Any,
  watched: Sequence[Array],
) -> DistillState[Student]:
  """State after a step, and what of it was not finite.

  Args:
    state: before the step.
    config: says how parameters are updated.
    loss: f32[], the same on every device; a plateau watches it.
    gradient: of the parameters, the same on every device.
    batch_stats: running statistics after the batch, or an empty collection.
    watched: f32[] each, what is checked to be finite, in the order of the run's terms.
  """
  params = state.student.variables["params"]
  rule = optax.with_extra_args_support(config.optimizer())
  updates, optimizer = rule.update(gradient, state.optimizer, params, value=loss)
  variables = {**state.student.variables, "params": optax.apply_updates(params, updates)}
  if "batch_stats" in variables:
    variables["batch_stats"] = batch_stats
  is_bad = ~jnp.isfinite(jnp.stack(watched))
  first_time = jnp.any(is_bad) & (state.bad_step < 0)
  return DistillState(
    step=state.step + 1,
    student=state.student.replace(variables=variables),
    optimizer=optimizer,
    bad_step=jnp.where(first_time, state.step, state.bad_step),
    bad_term=jnp.where(first_time, jnp.argmax(is_bad).astype(jnp.int32), state.bad_term),
  )


def watched_terms(stages: tuple[str, ...]) -> tuple[str, ...]:
  """Names of what a step checks to be finite, in the order in which a forward and backward pass meets it."""
  return ("the teacher's logits", *(f"the IQ term of stage {stage}" for stage in stages), "the KL term", "the gradient")


def track_statistics(apply: ApplyFn, axis_name: str | None) -> ApplyFn:
  """Wrap `apply`: normalize with the statistics of the batch over all devices, recorded for `updated_statistics`."""

  def note(module: nn.Module, x: Array, proceed: Any) -> Any:
    y = proceed(x)
    assert isinstance(module, nn.BatchNorm)
    # Of the statistics' shape: inside nn.scan it is stacked as they are.
    intercept.record(module, _MOMENTUM, jnp.full_like(running_moments(module).mean, module.momentum))
    return y

  tracked = observing(apply, axis_name=axis_name, current=(".*",))
  return intercept.intercept(tracked, lambda module: isinstance(module, nn.BatchNorm), note)


def updated_statistics(batch_stats: Variables, mutated: Variables) -> dict[str, Any]:
  """Running statistics after a batch: m old + (1 - m) batch, with each layer's own momentum m (PyTorch's is 1 - m).

  The variance of the batch is the biased one, as Flax has it. A layer that was called several times counts all its
  inputs together, once.

  Args:
    batch_stats: the collection before the batch.
    mutated: what a forward pass under `track_statistics` returned.

  Returns:
    A collection like `batch_stats`.
  """
  measured = recorded_moments(mutated)
  flat = flax.traverse_util.flatten_dict(dict(batch_stats))
  for layer, (momentum, *_) in intercept.collect(mutated, _MOMENTUM).items():
    path = () if layer == "<top>" else tuple(layer.split("/"))
    parts = [measured[layer]] if layer in measured else []
    while f"{layer}[{len(parts)}]" in measured:
      parts.append(measured[f"{layer}[{len(parts)}]"])
    for field in ("mean", "var"):
      old = flat[(*path, field)]
      batch = jnp.stack([getattr(part, field) for part in parts]).reshape(old.shape)
      flat[(*path, field)] = momentum * old + (1.0 - momentum) * batch
  return flax.traverse_util.unflatten_dict(flat)


def distill_loss(
  params: Any,
  student: Trainable,
  images: Array,
  teacher_logits: Array,
  teacher_features: dict[str, Array],
  config: DistillConfig,
  weights: Array | None = None,
  targets: Array | None = None,
  *,
  axis_name: str | None = None,
) -> tuple[Array, tuple[Array, dict[str, Array], Array, Any]]:
  """kl_weight * KL + iq_weight * IQ + target_weight * CE of one batch.

  Args:
    params: parameters to differentiate by, in place of the student's own.
    student: everything else: running statistics, activation ranges, structure.
    images: f32[b,h,w,c] in [0,1].
    teacher_logits: f32[b,k].
    teacher_features: `{stage: f32[b,h,w,c]}`, empty without IQ.
    config: weights of the terms, temperature and mode of BatchNorm.
    weights: f32[b] of this device's images: 1 counts, 0 is padding. None: all count.
    targets: soft labels f32[b,k]; needed where `config.target_weight` is not 0.
    axis_name: mapped axis of the devices.

  Returns:
    loss f32[]: this device's own, or with weights the one over all devices, whose images need not weigh the same;
    `parallel.value_and_grad_of_copy` is right for both. `(KL f32[], IQ terms {stage: f32[]}, logits f32[b,k],
    batch_stats after the batch)`: the terms are this device's own.

  Raises:
    KwjaxError: targets are missing; or, with weights, the input of a BatchNorm layer or a stage does not have the images
      along its leading axis.
  """
  trains = config.batch_norm == "train"
  apply = track_statistics(student.forward, axis_name) if trains else observing(student.forward, record_moments=False)
  variables = {**student.variables, "params": params}
  forwarded = variables if weights is None or not trains else weigh(variables, weights)
  with fewer_products():
    logits, mutated = recording_features(apply, tuple(teacher_features))(forwarded, images)
  stages = stage_losses(recorded_features(mutated), teacher_features, weights=weights, reduction=config.iq_reduction)
  kl = kl_divergence(logits, teacher_logits, temperature=config.temperature, weights=weights)
  loss = config.kl_weight * kl + config.iq_weight * sum(stages.values(), jnp.float32(0.0))
  if config.target_weight > 0.0:
    loss = loss + config.target_weight * target_loss(logits, targets, weights)
  if weights is not None:
    loss = parallel.mean(loss, axis_name, parallel.weight_share(weights, axis_name))
  batch_stats = variables.get("batch_stats", {})
  return loss, (kl, stages, logits, updated_statistics(batch_stats, mutated) if trains else batch_stats)


def target_loss(logits: Array, targets: Array | None, weights: Array | None = None) -> Array:
  """Cross-entropy to soft labels, -sum_j y_j log softmax(s)_j, averaged over the batch; f32[].

  Args:
    logits: f32[b,k].
    targets: f32[b,k]; a row of zeros is an image without a target and adds nothing.
    weights: f32[b] for a weighted mean over the batch, or None.

  Raises:
    KwjaxError: there are no targets.
  """
  if targets is None:
    raise KwjaxError("target_weight is not 0, and the images come without targets")
  return parallel.weighted_mean(optax.softmax_cross_entropy(logits, targets), weights)


def distill_step(
  state: DistillState[Student],
  batch: Array,
  teacher: Forwardable,
  config: DistillConfig,
  weights: Array | None = None,
  axis_name: str | None = None,
  *,
  targets: Array | None = None,
) -> tuple[DistillState[Student], dict[str, Array]]:
  """One step of Algorithm 2: teacher forward, student forward and backward, SGD or Adam, running statistics.

  The student's activation ranges are not trained; a fake-quantized student takes its weight scales anew from its
  weights in each forward pass.

  Args:
    state: the student, the same on every device.
    batch: f32[b,h,w,c] in [0,1], this device's share, augmented and mixed; both networks see it.
    teacher: in evaluation mode but for the BatchNorm layers of `config.current`; evaluated once, without a gradient.
    config: what to optimize and how.
    weights: f32[b] of this device's images: 1 counts, 0 is padding, which may be any finite image. None: all count.
    axis_name: mapped axis of the devices.
    targets: soft labels f32[b,k] of the images; needed where `config.target_weight` is not 0.

  Returns:
    The next state and metrics f32[], averaged over devices: loss, kl, iq, agreement (share of images on which both
    networks choose the same class), gradient_norm, learning_rate; target (the cross-entropy to the targets) where it
    counts.

  Raises:
    KwjaxError: a stage of the configuration is missing in a network, targets are missing, or weights do not fit a layer (see
      `distill_loss`).

  Source: Haroush et al. (2020), "The Knowledge Within", Algorithm 2.
  """
  stages = resolve_stages(state.student, teacher, config.stages) if config.iq_weight > 0.0 else ()
  observed = observing(teacher.forward, axis_name=axis_name, current=config.current, record_moments=False)
  teacher_variables = weigh(teacher.variables, weights) if config.current and weights is not None else teacher.variables
  with fewer_products():
    teacher_logits, recorded = jax.lax.stop_gradient(recording_features(observed, stages)(teacher_variables, batch))
  features = recorded_features(recorded)
  teacher_features = {stage: features[stage] for stage in stages}
  seen = batch if axis_name is None else _once_known(teacher_logits, batch)

  def loss_of(params: Any) -> Any:
    return distill_loss(
      params, state.student, seen, teacher_logits, teacher_features, config, weights, targets, axis_name=axis_name
    )

  params = state.student.variables["params"]
  (loss, (kl, iq, logits, batch_stats)), gradient = parallel.value_and_grad_of_copy(loss_of, axis_name)(params)
  agreement = parallel.weighted_mean(jnp.argmax(logits, -1) == jnp.argmax(teacher_logits, -1), weights)
  level = parallel.weighted_mean(teacher_logits, weights)
  share = parallel.weight_share(weights, axis_name)
  kl, iq, agreement, level = parallel.mean((kl, iq, agreement, level), axis_name, share)
  norm = optax.tree.norm(gradient)
  watched = (level, *(iq[stage] for stage in stages), kl, norm)
  updated = next_state(state, config, loss, gradient, batch_stats, watched)
  metrics = {
    "loss": loss,
    "kl": kl,
    "iq": sum(iq.values(), jnp.float32(0.0)),
    "agreement": agreement,
    "gradient_norm": norm,
    "learning_rate": jnp.asarray(config.learning_rate_at()(state.step), jnp.float32)
    * config.plateau_scale(updated.optimizer),
  }
  if config.target_weight > 0.0:
    metrics["target"] = parallel.mean(target_loss(logits, targets, weights), axis_name, share)
  return updated, metrics


def _once_known(logits: Array, batch: Array) -> Array:
  """The batch, not to be read before the teacher's logits are there.

  The student's BatchNorm layers wait for the other devices. XLA's CPU backend starts what is ready in an order of its own: one
  device waited while another still ran the teacher, and then the other way round.
  """
  return jax.lax.platform_dependent(batch, logits, cpu=lambda x, y: x + 0.0 * y[0, 0], default=lambda x, y: x)
