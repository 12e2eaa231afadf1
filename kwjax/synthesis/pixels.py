"""Algorithm 1: one step of optimizing the pixels of a batch; pure, for one device and for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kwjax.batchnorm import (
  INPUT,
  bns_loss,
  gaussian_kl,
  input_moments,
  observing,
  over_devices,
  recorded_moments,
  reference_moments,
  trimmed_jkl,
  weigh,
)
from kwjax.intercept import Forwardable
from kwjax.kernels import fewer_products
from kwjax.network import Array, Network
from kwjax.runtime.devices import parallel
from kwjax.synthesis.augment import augment
from kwjax.synthesis.config import SynthesisConfig
from kwjax.synthesis.dead_leaves_model import dead_leaves
from kwjax.synthesis.objective import Evidence, evaluate_objective, layer_divergences
from kwjax.synthesis.swing import swinging

LOSS, GRADIENT = "loss", "gradient"
"""What is reported as not finite when every layer's divergence is."""


class SynthesisState(NamedTuple):
  """A batch on its way.

  Attributes:
    images: f32[b,h,w,c], as the last Adam step left them: pixels may lie outside [0,1] until the next step clamps them.
    optimizer: Adam's moments.
    step: i32[], steps done.
    bad_step: i32[], the first step whose loss was not finite, or -1. Kept here so that no step waits for the host.
    bad_term: i32[], which layer it was, an index into `watched_layers`.
  """

  images: Array
  optimizer: optax.OptState
  step: Array
  bad_step: Array
  bad_term: Array


def initial_images(
  config: SynthesisConfig,
  key: Array,
  count: int,
  image_shape: tuple[int, int, int],
  *,
  devices: Sequence[jax.Device] = (),
) -> Array:
  """Starting point f32[n,h,w,c], the same whatever the devices that make it; the first step clamps it to [0,1]."""
  if config.init == "dead_leaves":
    return dead_leaves(key, count, image_shape, devices=devices)
  draw = jax.random.normal if config.init == "randn" else jax.random.uniform
  return draw(key, (count, *image_shape), jnp.float32)


def target_labels(config: SynthesisConfig, key: Array, count: int, num_classes: int) -> np.ndarray:
  """Targets i32[n]: "balanced" (each class equally often, in random order) or "random"."""
  if config.labels == "random":
    return np.asarray(jax.random.randint(key, (count,), 0, num_classes), np.int32)
  return np.asarray(jax.random.permutation(key, jnp.arange(count) % num_classes), np.int32)


def initial_state(config: SynthesisConfig, images: Array) -> SynthesisState:
  """State before the first step; `images` f32[b,h,w,c]."""
  return SynthesisState(images, _adam(config).init(images), jnp.int32(0), jnp.int32(-1), jnp.int32(0))


def _adam(config: SynthesisConfig) -> optax.GradientTransformation:
  return optax.adam(config.learning_rate_at(), b1=config.betas[0], b2=config.betas[1])


def watched_layers(network: Network, config: SynthesisConfig) -> tuple[str, ...]:
  """What `bad_term` counts: the layers in execution order, then the total loss and the gradient of the images."""
  if not config.objective.needs_statistics:
    return (LOSS, GRADIENT)
  return (*reference_moments(network, include_input=config.objective.include_input), LOSS, GRADIENT)


def synthesis_loss(
  images: Array,
  network: Network,
  labels: Array,
  key: Array,
  config: SynthesisConfig,
  weights: Array | None = None,
  *,
  student: Forwardable | None = None,
  axis_name: str | None = None,
) -> tuple[Array, dict[str, Array]]:
  """The objective of Algorithm 1 on one batch of images, over all devices.

  Args:
    images: f32[b,h,w,c] in [0,1], this device's share.
    network: the trained network, in evaluation mode.
    labels: i32[b], targets; valid classes, of padding too.
    key: PRNG key of this step, the same on every device.
    config: objective, augmentation and number of copies.
    weights: f32[b] of this device's images: 1 counts, 0 is padding, which changes no loss and gets a gradient of zero.
      Padding comes last in the batch over all devices, so that the other images keep their augmentation. None: all count.
    student: a network that learns from the images, for terms that compare it with `network`; gradients pass through it.
    axis_name: mapped axis of the devices.

  Returns:
    loss f32[]; metrics: every term f32[], `jkl` f32[], the J_KL of the views, `jkl_trimmed` without outliers, and `layers`
    f32[L + 1], the objective's divergence by layer and the loss.

  Raises:
    NoBatchNormError: the objective needs statistics and the network has none.
    KwjaxError: with weights, a BatchNorm layer's input does not have the images along its leading axis.
  """
  objective, n = config.objective, config.duplicates
  mean, std = jnp.asarray(network.input_mean, jnp.float32), jnp.asarray(network.input_std, jnp.float32)
  offset = parallel.axis_offset(images.shape[0], axis_name)
  views = augment(images, key, config.augmentation, duplicates=n, fill=mean, offset=offset)
  reference = reference_moments(network, include_input=objective.include_input) if objective.needs_statistics else {}
  forward = swinging(network.forward, jax.random.fold_in(key, 1)) if config.swing else network.forward
  apply = observing(forward, record_moments=objective.needs_statistics)
  view_weights = None if weights is None else jnp.repeat(jnp.asarray(weights, jnp.float32), n)
  variables = network.variables if view_weights is None else weigh(network.variables, view_weights)
  with fewer_products():
    logits, mutated = apply(variables, views)
    student_logits = None if student is None else student.forward(student.variables, views)[0]
  measured = recorded_moments(mutated)
  if objective.include_input and objective.needs_statistics:
    measured[INPUT] = input_moments(views, network, weights=view_weights)
  # All layers in one collective: one a layer would make the devices wait for each other at every layer.
  measured = over_devices(measured, axis_name, share=parallel.weight_share(weights, axis_name))
  evidence = Evidence(
    images=images,
    views=views,
    normalized=(views - mean) / std,
    logits=logits,
    labels=jnp.repeat(labels, n, axis=0),
    reference=reference,
    measured=measured,
    axis_name=axis_name,
    weights=view_weights,
    student_logits=student_logits,
  )
  loss, terms = evaluate_objective(evidence, objective)
  metrics = {"loss": loss, **terms}
  by_layer = []
  if objective.needs_statistics:
    by_layer = list(layer_divergences(evidence, objective).values())
    # Whatever form the objective takes, what is shown and compared is the J_KL of the paper.
    metrics["jkl"] = bns_loss(reference, measured)
    metrics["jkl_trimmed"] = trimmed_jkl({name: gaussian_kl(reference[name], measured[name]) for name in reference})
  return loss, {**metrics, "layers": jnp.stack([*by_layer, loss])}


def synthesis_step(
  state: SynthesisState,
  labels: Array,
  network: Network,
  key: Array,
  config: SynthesisConfig,
  weights: Array | None = None,
  *,
  student: Forwardable | None = None,
  axis_name: str | None = None,
) -> tuple[SynthesisState, dict[str, Array]]:
  """One step of Algorithm 1: clamp, augment, forward, objective, image gradient, Adam.

  The clamp is a projection of the variable, outside the gradient: inside, it would stop the gradient of saturated pixels.

  Args:
    state: this device's share of the batch.
    labels: i32[b], targets; valid classes, of padding too.
    network: the trained network.
    key: PRNG key of the batch; the step's own key is folded from it, so that a resumed run draws the same numbers.
    config: what to optimize and how.
    weights: f32[b] of this device's images: 1 counts, 0 is padding at the end of the batch, whose pixels are only clamped.
      None: all count.
    student: see `synthesis_loss`.
    axis_name: mapped axis of the devices.

  Returns:
    The next state and metrics: `loss`, every term, and `layers` f32[L + 1].
  """
  chex.assert_rank(state.images, 4)
  chex.assert_equal_shape_prefix([state.images, labels, *([] if weights is None else [weights])], 1)
  pixels = jnp.clip(state.images, 0.0, 1.0)
  step_key = jax.random.fold_in(key, state.step)

  def loss_of(images: Array) -> tuple[Array, dict[str, Array]]:
    return synthesis_loss(images, network, labels, step_key, config, weights, student=student, axis_name=axis_name)

  (_, metrics), gradient = parallel.value_and_grad_of_shard(loss_of, axis_name)(pixels)
  updates, optimizer = _adam(config).update(gradient, state.optimizer, pixels)
  size = parallel.mean(jnp.mean(jnp.abs(gradient)), axis_name)
  is_bad = ~jnp.isfinite(jnp.append(metrics["layers"], size))
  first_time = jnp.any(is_bad) & (state.bad_step < 0)
  next_state = SynthesisState(
    images=optax.apply_updates(pixels, updates),
    optimizer=optimizer,
    step=state.step + 1,
    bad_step=jnp.where(first_time, state.step, state.bad_step),
    bad_term=jnp.where(first_time, jnp.argmax(is_bad).astype(jnp.int32), state.bad_term),
  )
  return next_state, metrics
