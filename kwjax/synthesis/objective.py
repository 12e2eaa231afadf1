"""The synthesis objective: a weighted sum of terms, each a pure function of one forward pass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from kwjax.batchnorm import DIVERGENCES, Moments, layer_divergence
from kwjax.errors import KwjaxError
from kwjax.runtime.devices import parallel

Array = jax.Array


class Evidence(NamedTuple):
  """The inputs of a term.

  Attributes:
    images: f32[b,h,w,c] in [0,1], before augmentation.
    views: f32[v,h,w,c], the augmented images that the network sees.
    normalized: f32[v,h,w,c], (views - input_mean) / input_std.
    logits: f32[v,k].
    labels: i32[v], target classes; padding has valid ones too.
    reference: `{layer: Moments}`, the running statistics.
    measured: `{layer: Moments}` of the views, over all devices.
    axis_name: mapped axis of the devices, for terms that are not a mean over images.
    weights: f32[v] of the views: 1 counts, 0 is padding. None: all count.
    student_logits: f32[v,k] of the student that learns from the images while they are made; None where there is none.
  """

  images: Array
  views: Array
  normalized: Array
  logits: Array
  labels: Array
  reference: Mapping[str, Moments]
  measured: Mapping[str, Moments]
  axis_name: str | None = None
  weights: Array | None = None
  student_logits: Array | None = None

  @property
  def image_weights(self) -> Array | None:
    """f32[b], weights of the images; views of one image are neighbours and share its weight."""
    return None if self.weights is None else self.weights[:: self.views.shape[0] // self.images.shape[0]]


@dataclasses.dataclass(frozen=True)
class Objective:
  """Weights and settings of the terms. A term of weight zero is not computed.

  Attributes:
    bns: weight alpha of the BatchNorm-statistics divergence, Eq. (2)-(3).
    inception: weight beta of mean_i exp(-logit_{y_i} / inception_scale).
    cross_entropy: weight of the cross-entropy to the targets.
    smoothness: weight gamma of the Gaussian smoothness prior.
    total_variation: weight of the sum over four directions of the Frobenius norm of neighbour differences (DeepInversion).
    image_l2: weight of the mean Euclidean norm of a normalized image (DeepInversion).
    divergence: name in `kwjax.batchnorm.DIVERGENCES`.
    channel_sum: sum, not mean, over the channels of a layer.
    layer_sum: sum, not mean, over layers.
    first_layer: extra factor of the first BatchNorm layer (DeepInversion: 10).
    include_input: count the input statistics as one more layer.
    inception_scale: divisor of the logit; with 1 the exponential vanishes before half of the targets are reached.
    smoothness_size: side of the smoothing kernel in pixels, odd.
    smoothness_sigma: its standard deviation in pixels.
    monitor: terms of weight zero that are still computed and reported.
    extra: your own terms, `(name, weight, function of Evidence -> f32[])`. Their values are averaged over devices, by the
      sums of `Evidence.weights` if images have weights. For a mean over images, return
      `parallel.weighted_mean(values, evidence.weights)`; it must be finite on a device with only padding.
  """

  bns: float = 1.0
  inception: float = 0.0
  cross_entropy: float = 0.0
  smoothness: float = 0.0
  total_variation: float = 0.0
  image_l2: float = 0.0
  divergence: str = "gaussian_kl"
  channel_sum: bool = False
  layer_sum: bool = False
  first_layer: float = 1.0
  include_input: bool = True
  inception_scale: float = 10.0
  smoothness_size: int = 5
  smoothness_sigma: float = 1.0
  monitor: tuple[str, ...] = ()
  extra: tuple[tuple[str, float, Callable[[Evidence], Array]], ...] = ()

  def __post_init__(self) -> None:
    for name in ("monitor", "extra"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if self.divergence not in DIVERGENCES:
      raise KwjaxError(f"unknown divergence {self.divergence!r}; known: {', '.join(DIVERGENCES)}")
    unknown = [name for name in self.monitor if name not in TERMS]
    if unknown:
      raise KwjaxError(f"unknown objective terms {unknown}; known: {', '.join(TERMS)}")
    if self.smoothness_size % 2 == 0 or self.smoothness_size < 1 or self.smoothness_sigma <= 0:
      raise KwjaxError(
        f"the smoothing kernel needs an odd size and sigma > 0, found {self.smoothness_size}, {self.smoothness_sigma}"
      )

  @property
  def needs_statistics(self) -> bool:
    """Whether a term needs BatchNorm statistics."""
    return bool(self.bns) or "bns" in self.monitor

  def weight(self, name: str) -> float:
    """Weight of a built-in term."""
    return float(getattr(self, name))


def layer_divergences(evidence: Evidence, objective: Objective) -> dict[str, Array]:
  """The BNS divergence of each layer, `{layer: f32[]}`."""
  divergence = DIVERGENCES[objective.divergence]
  return layer_divergence(
    evidence.reference, evidence.measured, divergence=divergence, channel_sum=objective.channel_sum
  )


def inception_loss(logits: Array, labels: Array, *, scale: float = 10.0, weights: Array | None = None) -> Array:
  """mean_i exp(-logits[i, y_i] / scale), Eq. (6); it moves each image towards its class.

  Args:
    logits: f32[b,k].
    labels: i32[b], in 0 .. k-1.
    scale: divisor of the logit.
    weights: f32[b] for a weighted mean, or None.

  Returns:
    f32[].

  Source: Haroush et al. (2020), section 3.3, which does not give the divisor.
  """
  losses = jnp.exp(-jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0] / scale)
  return parallel.weighted_mean(losses, weights)


@functools.cache
def gaussian_kernel(size: int, sigma: float) -> np.ndarray:
  """Normalized one-dimensional Gaussian f32[size]; the two-dimensional one is its outer product."""
  x = np.arange(size) - (size - 1) / 2
  kernel = np.exp(-(x**2) / (2 * sigma**2))
  return (kernel / kernel.sum()).astype(np.float32)


def smoothness_prior(images: Array, *, size: int = 5, sigma: float = 1.0, weights: Array | None = None) -> Array:
  """MSE(X, G * X): how much a Gaussian blur changes images f32[b,h,w,c], of weights f32[b]; f32[].

  Reflect padding; the gradient goes through the blur. The blur is separable: two passes of shifted sums.

  Source: Haroush et al. (2020), Eq. (7); also the "smoothness" of their Figure 2.
  """
  half = size // 2
  kernel = gaussian_kernel(size, sigma)
  blurred = images
  for axis in (1, 2):
    pads = [(0, 0)] * 4
    pads[axis] = (half, half)
    padded = jnp.pad(blurred, pads, mode="reflect")
    shifted = (lax.slice_in_dim(padded, i, i + images.shape[axis], axis=axis) for i in range(size))
    blurred = functools.reduce(jnp.add, (float(k) * s for k, s in zip(kernel, shifted, strict=True)))
  return parallel.weighted_mean(jnp.square(images - blurred), weights)


def total_variation(x: Array, *, axis_name: str | None = None, weights: Array | None = None) -> Array:
  """Sum over the directions right, down and both diagonals of ||neighbour difference||_F over a batch f32[b,h,w,c]; f32[].

  The norm is over the whole batch and all devices, so it grows with the root of the batch size. Weights f32[b] multiply an
  image's squared differences; padding adds nothing.

  Source: Yin et al. (2020), DeepInversion.
  """
  differences = (
    x[:, :, 1:] - x[:, :, :-1],
    x[:, 1:] - x[:, :-1],
    x[:, 1:, 1:] - x[:, :-1, :-1],
    x[:, 1:, :-1] - x[:, :-1, 1:],
  )
  w = None if weights is None else weights[:, None, None, None]
  squares = jnp.stack([jnp.sum(jnp.square(d) if w is None else w * jnp.square(d)) for d in differences])
  if axis_name is not None:
    squares = lax.psum(squares, axis_name)
  # The gradient of a norm at zero is NaN; the tiny constant makes it zero.
  return jnp.sum(jnp.sqrt(squares + 1e-20))


def _bns(evidence: Evidence, objective: Objective) -> Array:
  values = list(layer_divergences(evidence, objective).values())
  # Layers are in execution order; the input, if counted, is first.
  values[int(objective.include_input)] = values[int(objective.include_input)] * objective.first_layer
  return (jnp.sum if objective.layer_sum else jnp.mean)(jnp.stack(values))


def _cross_entropy(evidence: Evidence, objective: Objective) -> Array:
  losses = optax.softmax_cross_entropy_with_integer_labels(evidence.logits, evidence.labels)
  return parallel.weighted_mean(losses, evidence.weights)


def _inception(evidence: Evidence, objective: Objective) -> Array:
  return inception_loss(evidence.logits, evidence.labels, scale=objective.inception_scale, weights=evidence.weights)


def _smoothness(evidence: Evidence, objective: Objective) -> Array:
  # On the image, not on its views: the edge of a cutout does not belong to the image.
  return smoothness_prior(
    evidence.images,
    size=objective.smoothness_size,
    sigma=objective.smoothness_sigma,
    weights=evidence.image_weights,
  )


def _total_variation(evidence: Evidence, objective: Objective) -> Array:
  return total_variation(evidence.normalized, axis_name=evidence.axis_name, weights=evidence.weights)


def _image_l2(evidence: Evidence, objective: Objective) -> Array:
  flat = evidence.normalized.reshape(evidence.normalized.shape[0], -1)
  return parallel.weighted_mean(jnp.sqrt(jnp.sum(jnp.square(flat), axis=1) + 1e-20), evidence.weights)


TERMS: Mapping[str, Callable[[Evidence, Objective], Array]] = {
  "bns": _bns,
  "inception": _inception,
  "cross_entropy": _cross_entropy,
  "smoothness": _smoothness,
  "total_variation": _total_variation,
  "image_l2": _image_l2,
}


def evaluate_objective(evidence: Evidence, objective: Objective) -> tuple[Array, dict[str, Array]]:
  """Total loss sum_t w_t L_t and the value of every computed term, averaged over devices by weight.

  Args:
    evidence: of one forward pass.
    objective: weights and settings.

  Returns:
    loss f32[], `{term: f32[]}`.
  """
  terms: dict[str, Array] = {}
  total = jnp.float32(0.0)
  share = parallel.weight_share(evidence.weights, evidence.axis_name)
  for name, function in TERMS.items():
    weight = objective.weight(name)
    if weight or name in objective.monitor:
      terms[name] = parallel.mean(function(evidence, objective), evidence.axis_name, share)
      total = total + weight * terms[name] if weight else total
  for name, weight, extra in objective.extra:
    terms[name] = parallel.mean(extra(evidence), evidence.axis_name, share)
    total = total + weight * terms[name]
  return total, terms
