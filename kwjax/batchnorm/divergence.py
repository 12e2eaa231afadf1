"""How far measured statistics are from the ones a network was trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from kwjax.batchnorm.moments import Moments
from kwjax.errors import KwjaxError

Array = jax.Array
Divergence = Callable[[Moments, Moments], Array]
"""`(reference, measured) -> f32[c]`, or f32[] for forms that are norms over the channels."""


def gaussian_kl(reference: Moments, measured: Moments, *, eps: float = 1e-8) -> Array:
  r"""KL(N(reference) || N(measured)) per channel, Eq. (1) of Haroush et al. (2020).

  $\log(\tilde\sigma/\hat\sigma) - \frac12 (1 - (\hat\sigma^2 + (\hat\mu-\tilde\mu)^2) / \tilde\sigma^2)$,
  with the reference $\hat\mu, \hat\sigma$ and the measured $\tilde\mu, \tilde\sigma$.

  Args:
    reference: moments f32[c]. A variance below eps counts as eps, so a dead channel gives a finite divergence.
    measured: moments f32[c].
    eps: added to the measured variance.

  Returns:
    f32[c], >= 0 up to eps, zero iff the two Gaussians agree.
  """
  var, ref_var = measured.var + eps, jnp.maximum(reference.var, eps)
  return 0.5 * (jnp.log(var / ref_var) - 1.0 + (ref_var + jnp.square(reference.mean - measured.mean)) / var)


def log_gaussian_kl(reference: Moments, measured: Moments) -> Array:
  """log(1 + KL) for each channel: close to the KL where that is small, with a bounded influence of large ones; f32[c].

  Behind a ReLU6 some channels fire on few images only. On other images their measured variance is zero and their KL of
  order 1e5, more than all other channels together. The logarithm divides its gradient by 1 + KL.
  """
  return jnp.log1p(jnp.maximum(gaussian_kl(reference, measured), 0.0))


def moment_mse(reference: Moments, measured: Moments) -> Array:
  """(mean - mean)^2 + (var - var)^2 per channel: the BNS loss of GDFQ and Qimera; f32[c]."""
  return jnp.square(reference.mean - measured.mean) + jnp.square(reference.var - measured.var)


def std_mse(reference: Moments, measured: Moments, *, eps: float = 1e-6) -> Array:
  """(mean - mean)^2 + (std - std)^2 per channel: ZeroQ and Genie; f32[c]."""
  std, ref_std = jnp.sqrt(measured.var + eps), jnp.sqrt(reference.var + eps)
  return jnp.square(reference.mean - measured.mean) + jnp.square(ref_std - std)


def moment_l2(reference: Moments, measured: Moments) -> Array:
  """||mean - mean||_2 + ||var - var||_2 over the channels: DeepInversion, CMI, NAYER; f32[]."""

  def norm(d: Array) -> Array:
    # The gradient of a norm at zero is NaN; the tiny constant makes it zero.
    return jnp.sqrt(jnp.sum(jnp.square(d)) + 1e-20)

  return norm(reference.mean - measured.mean) + norm(reference.var - measured.var)


DIVERGENCES: Mapping[str, Divergence] = {
  "gaussian_kl": gaussian_kl,
  "log_gaussian_kl": log_gaussian_kl,
  "moment_mse": moment_mse,
  "std_mse": std_mse,
  "moment_l2": moment_l2,
}


OUTLIER_NATS = 10.0
"""Divergence above which a channel is an outlier: its measured standard deviation is a fifth of the reference, or its mean is
off by 4.5 measured standard deviations."""


def trimmed_jkl(divergences: Mapping[str, Array]) -> Array:
  """J_KL without the outliers, the channels of more than `OUTLIER_NATS`; f32[].

  Two channels of EfficientNet-Lite0 have 99 % of the J_KL of synthetic images, 20.7 instead of 0.11 nats. A layer of which no
  channel is left does not count; if no layer is left, the result is NaN.

  Args:
    divergences: `{layer: f32[c]}`, `gaussian_kl` of each layer that counts.
  """
  means = []
  for values in divergences.values():
    kept = values <= OUTLIER_NATS
    means.append(jnp.sum(jnp.where(kept, values, 0.0)) / jnp.sum(kept))
  return jnp.nanmean(jnp.stack(means))


def layer_divergence(
  reference: Mapping[str, Moments],
  measured: Mapping[str, Moments],
  *,
  divergence: Divergence = gaussian_kl,
  channel_sum: bool = False,
) -> dict[str, Array]:
  """Divergence of each layer: the mean (or sum) over its channels; `{layer: f32[]}`.

  Raises:
    KwjaxError: a reference layer was not measured, or no layer is given.
  """
  missing = [name for name in reference if name not in measured]
  if missing or not reference:
    raise KwjaxError(f"no statistics were measured for the reference layers {missing or '(there are none)'}")
  reduce = jnp.sum if channel_sum else jnp.mean
  return {name: reduce(divergence(reference[name], measured[name])) for name in reference}


def bns_loss(
  reference: Mapping[str, Moments],
  measured: Mapping[str, Moments],
  *,
  divergence: Divergence = gaussian_kl,
  channel_sum: bool = False,
) -> Array:
  r"""J_KL: mean over layers of the mean over channels of the divergence, Eq. (2)-(3) of Haroush et al. (2020).

  $J_{KL} = \frac1N \sum_l \frac1{C_l} \sum_c D(\hat\mu_{lc}, \hat\sigma_{lc}; \tilde\mu_{lc}, \tilde\sigma_{lc})$

  The paper does not state the reduction inside a layer. Only the mean gives scores of the published magnitude.

  Args:
    reference: `{layer: Moments f32[c]}`; these layers count.
    measured: the same layers, of a batch or of a data set.
    divergence: gaussian_kl, or a form of another method.
    channel_sum: sum over the channels of a layer instead of the mean.

  Returns:
    f32[].

  Raises:
    KwjaxError: a reference layer was not measured.
  """
  per_layer = layer_divergence(reference, measured, divergence=divergence, channel_sum=channel_sum)
  return jnp.mean(jnp.stack(list(per_layer.values())))
