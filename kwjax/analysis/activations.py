"""Inputs of a network's BatchNorm layers: distributions, divergence and dead channels by layer, and the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.batchnorm import (
  Moments,
  entry_weights,
  gaussian_kl,
  matches,
  observing,
  over_devices,
  recorded_moments,
  reference_moments,
  weigh,
)
from kwjax.batchnorm.moments import Pooled, merge_layers
from kwjax.batchnorm.normalize import running_moments
from kwjax.errors import DataError, KwjaxError
from kwjax.network import ApplyFn, Array, Network
from kwjax.runtime.devices.forwarding import forward_batches
from kwjax.runtime.devices.parallel import Devices, weight_share

REACH = 6.0
"""The histograms go from -REACH to REACH running standard deviations around the running mean."""
BINS = 96

_COUNTS, _ALIVE = "activation_counts", "alive_channels"


def bin_edges() -> np.ndarray:
  """Edges f64[BINS + 1] of the histograms' bins, in running standard deviations."""
  return np.linspace(-REACH, REACH, BINS + 1)


@dataclasses.dataclass(frozen=True)
class Activations:
  """What `observe_activations` found. Mappings are in execution order.

  Attributes:
    counts: `{layer: i64[BINS + 2]}`, histogram of the BatchNorm layer's input over all channels, each in units of its own
      running statistics. The first entry counts values below the bins, the last those above.
    reference: `{layer: Moments f[c]}`, the running statistics.
    measured: `{layer: Moments f[c]}`, moments of the inputs over all images.
    dead: `{layer: bool[c]}` for every convolution and dense layer but the first: input channels that are zero in every pixel
      of every image, as behind a dead ReLU.
    logits: f32[n,k], what the network answers.
  """

  counts: dict[str, np.ndarray]
  reference: dict[str, Moments]
  measured: dict[str, Moments]
  dead: dict[str, np.ndarray]
  logits: np.ndarray

  def divergence(self) -> dict[str, float]:
    """KL of the running from the measured Gaussian in nats, the mean over a layer's channels, as in J_KL."""
    return {name: float(jnp.mean(gaussian_kl(self.reference[name], found))) for name, found in self.measured.items()}

  def spread(self) -> dict[str, float]:
    r"""$\exp(\mathrm{mean}_c \ln(\tilde\sigma_c/\hat\sigma_c))$, measured over running: 1 as in training, 0 without variation."""
    found = {}
    for name, measured in self.measured.items():
      ratio = np.asarray(measured.var, np.float64) / np.maximum(np.asarray(self.reference[name].var, np.float64), 1e-30)
      found[name] = float(np.exp(0.5 * np.mean(np.log(np.maximum(ratio, 1e-30)))))
    return found

  def dead_share(self) -> float:
    """Share of dead channels in [0, 1] over all layers; 0 where there are no channels to look at."""
    flags = [flag for flags in self.dead.values() for flag in np.ravel(flags)]
    return float(np.mean(flags)) if flags else 0.0


def recording_activations(apply: ApplyFn, network: Network, weights: Array | None = None) -> ApplyFn:
  """Wrap `apply`: record a histogram of every BatchNorm input, and which input channels of later layers are ever not zero.

  Args:
    apply: what to wrap; `observing` belongs inside, because it takes the place of the layers.
    network: its float network.
    weights: f32[b], 1 for an image that counts and 0 for padding, or None: all count.
  """
  names = {layer.name for layer in intercept.matmul_layers(network)[1:]}

  def counting(module: nn.Module, x: Array) -> Array | None:
    """Which entries of the first axis belong to images that count: bool[b, 1, ...]; None: all."""
    if weights is None:
      return None
    return (entry_weights(module, x, weights) > 0).reshape(-1, *[1] * (x.ndim - 1))

  def handle(module: nn.Module, x: Array, proceed: Callable[[Array], Any]) -> Any:
    y = proceed(x)  # refuses what has no single feature axis
    counts = counting(module, x)
    if isinstance(module, nn.BatchNorm):
      intercept.record(module, _COUNTS, _standardized_counts(module, x, counts))
    else:
      alive = x != 0 if counts is None else (x != 0) & counts
      intercept.record(module, _ALIVE, jnp.any(alive, axis=tuple(range(x.ndim - 1))))
    return y

  return intercept.intercept(
    apply, lambda module: isinstance(module, nn.BatchNorm) or intercept.layer_name(module) in names, handle
  )


def _standardized_counts(module: nn.BatchNorm, x: Array, counts: Array | None) -> Array:
  """i32[BINS + 2] of (x - running mean) / sqrt(running variance + eps), over the entries that count."""
  running = running_moments(module)
  assert isinstance(module.axis, int)
  x = jnp.moveaxis(jnp.asarray(x, jnp.float32), module.axis, -1)
  added: Array | int = 1
  if counts is not None:
    added = jnp.broadcast_to(jnp.moveaxis(counts, module.axis, -1), x.shape).astype(jnp.int32).ravel()
  z = (x - running.mean) * jax.lax.rsqrt(running.var + module.epsilon)
  place = jnp.clip(jnp.floor((z + REACH) * (BINS / (2 * REACH))), -1, BINS).astype(jnp.int32) + 1
  return jnp.zeros(BINS + 2, jnp.int32).at[place.ravel()].add(added)


def _observed(
  network: Network, images: Array, weights: Array | None, axis_name: str | None, current: tuple[str, ...]
) -> dict[str, Any]:
  """Of one batch: moments over all devices; counts, channels and logits of the images of this device."""
  variables = network.variables if weights is None else weigh(network.variables, weights)
  with jax.default_matmul_precision("highest"):
    inner = observing(network.forward, axis_name=axis_name, current=current)
    logits, mutated = recording_activations(inner, network, weights)(variables, images)
  # nn.scan stacks its layers in front; a layer that is called several times records several values.
  return {
    "moments": over_devices(recorded_moments(mutated), axis_name, share=weight_share(weights, axis_name)),
    "logits": logits,
    "counts": {name: jnp.stack(calls).sum(0) for name, calls in intercept.collect(mutated, _COUNTS).items()},
    "alive": {name: jnp.stack(calls).any(0) for name, calls in intercept.collect(mutated, _ALIVE).items()},
  }


def observe_activations(
  network: Network,
  images: Array | np.ndarray,
  *,
  current: Sequence[str] = (),
  batch_size: int = 128,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> Activations:
  r"""Distributions of every BatchNorm layer's input over a set of images, in units of the running statistics.

  The histograms are of $z = (x - \hat\mu_c) / \sqrt{\hat\sigma_c^2 + \epsilon}$: on the training data z has mean 0 and
  variance 1 in every channel. The moments are pooled over the batches exactly, $\mu = \sum_b n_b \mu_b / n$,
  $\sigma^2 = \sum_b n_b (\sigma_b^2 + (\mu_b - \mu)^2) / n$.

  Args:
    network: with `nn.BatchNorm`.
    images: f32[n,h,w,c] in [0,1], or noise; n >= 2.
    current: paths or regular expressions of the layers that normalize with the statistics of their batch, (".*",) for all.
      The others use the running statistics. What a layer gets depends on what the layers before it used.
    batch_size: most images in a batch, at least 2. The set is cut into batches as equal as possible, whatever the devices.
      It matters where layers use the statistics of the batch.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    Activations.

  Raises:
    NoBatchNormError: the network has no BatchNorm.
    DataError: there are fewer than two images, or the batch size is below 2.
    KwjaxError: `current` names no layer.
    NonFiniteError: the network returns NaN or infinite logits.
    Interrupted: `should_stop` returned True, in any process.

  Source: Raikwar & Mishra (2022), "Discovering and Overcoming Limitations of Noise-engineered Data-free Knowledge Distillation".
  """
  reference, names = reference_moments(network), intercept.batch_norm_layers(network)
  unknown = [pattern for pattern in current if not any(matches(name, [pattern]) for name in names)]
  if unknown:
    raise KwjaxError(f"no BatchNorm layer of {network.name} matches {unknown}; there are {', '.join(names[:8])}, ...")
  if len(images) < 2 or batch_size < 2:
    raise DataError(
      f"distributions of activations need at least two images in a batch, found {len(images)} images and batches of {batch_size}"
    )

  def check(found: dict[str, Any]) -> str | None:
    return None if np.isfinite(found["logits"]).all() else f"{network.name} returns NaN or infinite logits"

  pooled: dict[str, Pooled] = {}
  counts: dict[str, np.ndarray] = {}
  alive: dict[str, np.ndarray] = {}
  logits = []
  for found, count in forward_batches(
    _observed,
    network,
    images,
    batch_size=batch_size,
    description="activations",
    devices=devices,
    progress=progress,
    should_stop=should_stop,
    check=check,
    options={"current": tuple(current)},
  ):
    pooled = merge_layers(pooled, jax.tree.map(lambda value: value[0], found["moments"]), count)
    for name, by_device in found["counts"].items():
      counts[name] = counts.get(name, 0) + by_device.sum(0, dtype=np.int64)
    for name, by_device in found["alive"].items():
      alive[name] = alive.get(name, False) | by_device.any(0)
    logits.append(np.concatenate(found["logits"]).astype(np.float32)[:count])
  return Activations(
    _unstacked(intercept.in_order(counts, names)),
    reference,
    {name: Moments(jnp.asarray(pooled[name].mean), jnp.asarray(pooled[name].var)) for name in reference},
    intercept.in_order(
      {name: ~flags for name, flags in alive.items()}, [m.name for m in intercept.matmul_layers(network)]
    ),
    np.concatenate(logits),
  )


def _unstacked(counts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Layers that nn.scan stacks, one by one: named `path[i]` as their moments are."""
  found: dict[str, np.ndarray] = {}
  for name, value in counts.items():
    rows = value.reshape(-1, value.shape[-1])
    found.update({name: rows[0]} if value.ndim == 1 else {f"{name}[{i}]": row for i, row in enumerate(rows)})
  return found
