"""Mean and variance of a layer's input: of one batch, over devices, and of a whole data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from kwjax.runtime.devices import parallel, processes

Array = jax.Array

_FEW = 4  # channels


class Moments(NamedTuple):
  """Mean and variance of each channel. Invariant: biased variance (divided by n), float32.

  PyTorch's running variance is unbiased (divided by n - 1). It is used unchanged: a BatchNorm layer averages over
  thousands of pixels, so the factor n / (n - 1) is far below the noise of the statistics.
  """

  mean: Array
  var: Array


def batch_moments(
  x: Array,
  *,
  feature_axis: int = -1,
  shift: Array | None = None,
  axis_name: str | None = None,
  weights: Array | None = None,
) -> Moments:
  """Biased moments of x over all axes but the feature axis, in float32.

  mean = E[x],  var = E[(x - mean)^2], with E[f] = sum_i w_i f_i / sum_i w_i. Over devices or with weights
  var = E[(x - s)^2] - (E[x] - s)^2, with s the shift. One collective for each layer is then enough. A shift near the
  mean keeps all digits; with s = 0 the variance would lose them where the mean is large.

  Args:
    x: activations, any float type, feature axis of size c.
    feature_axis: the axis that is kept.
    shift: f32[c], a constant near the mean, such as the running mean; no gradient flows to it. Default zero.
    axis_name: mapped axis; the moments are over all its devices. Without weights, devices hold equal shares.
    weights: f32[b] >= 0 along the first axis of x: 1 counts, 0 is padding, which must be finite. None: all count. If all
      weights are zero, the mean is the shift and the variance 0.

  Returns:
    Moments f32[c].

  Source: Chan, Golub & LeVeque (1983), "Algorithms for computing the sample variance", shifted data.
  """
  x = jnp.moveaxis(jnp.asarray(x, jnp.float32), feature_axis, -1)
  if axis_name is None and weights is None:
    return Moments(*_two_pass(x))
  s = jnp.zeros(x.shape[-1], jnp.float32) if shift is None else lax.stop_gradient(jnp.asarray(shift, jnp.float32))
  if weights is None:
    first, second = jnp.mean(x, tuple(range(x.ndim - 1))) - s, _mean_square(x, s)
    if axis_name is not None:
      first, second = lax.pmean(jnp.stack([first, second]), axis_name)
  else:
    first, second = _weighted_means(x - s, jnp.asarray(weights, jnp.float32), axis_name)
  # Rounding can make the variance of a constant channel negative, and its log() NaN.
  return Moments(s + first, jnp.maximum(second - jnp.square(first), 0.0))


@jax.custom_jvp
def _two_pass(x: Array) -> tuple[Array, Array]:
  """Mean and biased variance f32[c] of f32[...,c]: E[x], then E[(x - E[x])^2]."""
  axes = tuple(range(x.ndim - 1))
  if x.ndim > 2 and x.shape[-1] <= _FEW:
    # Three channels do not fill a vector register: sum along lines of pixels first.
    pixels, channels = x.shape[-2:]
    lines = x.reshape(*x.shape[:-2], -1)
    mean = jnp.mean(jnp.mean(lines, axes[:-1]).reshape(pixels, channels), 0)
    squares = jnp.square(lines - jnp.tile(mean, pixels))
    return mean, jnp.mean(jnp.mean(squares, axes[:-1]).reshape(pixels, channels), 0)
  mean = jnp.mean(x, axes)
  return mean, jnp.mean(jnp.square(x - mean), axes)


@_two_pass.defjvp
def _two_pass_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
  """Tangents E[dx] and 2 E[(x - mean) dx]. The mean's part in the variance's derivative is zero.

  2 x - 2 mean equals 2 (x - mean) bit for bit. XLA sees a separate array and does not store x - mean in the forward pass.
  """
  (x,), (dx,) = primals, tangents
  axes = tuple(range(x.ndim - 1))
  mean, var = _two_pass(x)
  scaled = dx * (1.0 / max(x[..., 0].size, 1))
  return (mean, var), (jnp.sum(scaled, axes), jnp.sum((2.0 * x - 2.0 * mean) * scaled, axes))


@jax.custom_jvp
def _mean_square(x: Array, shift: Array) -> Array:
  """E[(x - s)^2], f32[c] of f32[...,c]."""
  return jnp.mean(jnp.square(x - shift), tuple(range(x.ndim - 1)))


@_mean_square.defjvp
def _mean_square_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
  """The tangent 2 E[(x - s) (dx - ds)], written with 2 x - 2 s for the reason in `_two_pass_jvp`.

  x + (-s) has no effect: XLA writes x - s so for a constant s.
  """
  (x, shift), (dx, dshift) = primals, tangents
  axes = tuple(range(x.ndim - 1))
  scaled = (dx - dshift) * (1.0 / max(x[..., 0].size, 1))
  return _mean_square(x, shift), jnp.sum((2.0 * x - 2.0 * shift) * scaled, axes)


def _weighted_means(centred: Array, weights: Array, axis_name: str | None) -> Array:
  """sum_i w_i mean(f_i) / sum_i w_i of f = x and f = x^2, f32[2,c]; sums and weight travel in one collective."""
  axes = tuple(range(1, centred.ndim - 1))
  by_image = jnp.stack([jnp.mean(centred, axes), jnp.mean(jnp.square(centred), axes)], axis=1)
  # Not a matrix product: the default precision of GPUs and TPUs would round the statistics.
  sums = jnp.sum(weights[:, None, None] * by_image, axis=0)
  total = jnp.sum(weights)
  if axis_name is not None:
    packed = lax.psum(jnp.append(sums, total), axis_name)
    sums, total = packed[:-1].reshape(sums.shape), packed[-1]
  return sums / jnp.where(total > 0.0, total, 1.0)


def over_devices(
  moments: Mapping[str, Moments], axis_name: str | None, *, share: Array | None = None
) -> dict[str, Moments]:
  """Moments over all devices from the moments of each device, in two collectives for any number of layers.

  mean = sum_d a_d mean_d,  var = sum_d a_d (var_d + (mean_d - mean)^2), with a_d the device's share of the samples.

  Args:
    moments: `{layer: Moments}` of this device; moments that are over all devices already stay unchanged.
    axis_name: mapped axis, or None on one device.
    share: f32[], a_d of `kwjax.runtime.devices.parallel.weight_share`; None: 1 / D.

  Returns:
    `{layer: Moments}` in the same order.
  """
  if axis_name is None or not moments:
    return dict(moments)
  means, unravel = ravel_pytree([m.mean for m in moments.values()])
  variances, _ = ravel_pytree([m.var for m in moments.values()])
  mean = parallel.mean(means, axis_name, share)
  var = parallel.mean(variances + jnp.square(means - mean), axis_name, share)
  return {name: Moments(*both) for name, both in zip(moments, zip(unravel(mean), unravel(var)), strict=True)}


def pool(parts: Sequence[Moments]) -> Moments:
  """Moments of the union of equally large samples (the calls of a shared layer).

  mean = avg(mean_i),  var = avg(var_i) + avg((mean_i - mean)^2).
  """
  if len(parts) == 1:
    return parts[0]
  means, variances = jnp.stack([p.mean for p in parts]), jnp.stack([p.var for p in parts])
  mean = means.mean(0)
  return Moments(mean, variances.mean(0) + jnp.square(means - mean).mean(0))


class Pooled(NamedTuple):
  """Moments of a stream so far, float64 on the host, and its number of samples."""

  samples: float
  mean: np.ndarray
  var: np.ndarray


def merge(total: Pooled | None, batch: Moments, count: float) -> Pooled:
  """Add a batch to a stream exactly: Chan's update of mean and biased variance.

  delta = mean_b - mean_a,  mean = mean_a + delta n_b / n,
  var = (n_a var_a + n_b var_b) / n + delta^2 n_a n_b / n^2.

  Args:
    total: the stream so far, or None.
    batch: moments of the batch, [c].
    count: number of its samples. Images work too, as each has the same number of pixels.
  """
  mean, var = np.asarray(batch.mean, np.float64), np.asarray(batch.var, np.float64)
  if total is None:
    return Pooled(float(count), mean, var)
  n = total.samples + count
  delta = mean - total.mean
  pooled_var = (total.samples * total.var + count * var) / n + delta**2 * (total.samples * count / n**2)
  return Pooled(n, total.mean + delta * (count / n), pooled_var)


def merge_layers(total: Mapping[str, Pooled], batch: Mapping[str, Moments], count: float) -> dict[str, Pooled]:
  """Add the moments of every layer of a batch to a stream, see `merge`."""
  return {name: merge(total.get(name), moments, count) for name, moments in batch.items()}


def over_processes(own: Mapping[str, Pooled], like: Mapping[str, Moments]) -> dict[str, Pooled]:
  """The moments behind the images of all processes, merged in the order of the processes and so the same in each.

  Args:
    own: stream of this process by layer; a process without images has none.
    like: moments of every layer, for their names and shapes.
  """
  if processes.count() == 1:
    return dict(own)
  found = {}
  for name, shape in ((name, np.shape(moments.mean)) for name, moments in like.items()):
    pooled = own.get(name, Pooled(0.0, np.zeros(shape), np.zeros(shape)))
    total: Pooled | None = None
    samples, rows = processes.exchange(pooled.samples), processes.gather(np.stack([pooled.mean, pooled.var])[None])
    for (mean, var), count in zip(rows, samples, strict=True):
      if count:
        # Not as Moments of float32: each process has merged in float64.
        total = merge(total, Moments(mean, var), count)
    if total is not None:
      found[name] = total
  return found
