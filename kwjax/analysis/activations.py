"""What reaches the BatchNorm layers of a network, by layer: distributions, divergence, dead channels, and the answers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.batchnorm import (
  Moments,
  gaussian_kl,
  matches,
  observing,
  over_devices,
  recorded_moments,
  reference_moments,
)
from kwjax.batchnorm.moments import Pooled, merge
from kwjax.batchnorm.normalize import running_moments
from kwjax.errors import DataError, Interrupted, KwjaxError, NonFiniteError
from kwjax.network import ApplyFn, Array, Network
from kwjax.runtime import processes
from kwjax.runtime.parallel import DeviceGroup, device_group

REACH = 6.0
"""The histograms go from -REACH to REACH running standard deviations around the running mean."""
BINS = 96

_COUNTS, _ALIVE = "activation_counts", "alive_channels"


def bin_edges() -> np.ndarray:
  """Edges f64[BINS + 1] of the histograms' bins, in running standard deviations."""
  return np.linspace(-REACH, REACH, BINS + 1)


@dataclasses.dataclass(frozen=True)
class Activations:
  """What `observe_activations` saw. Mappings are in execution order.

  Attributes:
    counts: `{layer: i64[BINS + 2]}`, values of the BatchNorm layer's input, each channel in units of its own running statistics,
      all channels together; the first entry counts what lies below the bins, the last what lies above.
    reference: `{layer: Moments f[c]}`, the running statistics.
    measured: `{layer: Moments f[c]}`, moments of the inputs over all images.
    dead: `{layer: bool[c]}` for every convolution and dense layer but the first: input channels that are zero in every pixel of
      every image, which is what a dead ReLU leaves.
    logits: f32[n,k], the answers.
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
    """Share of the dead channels in [0, 1], all layers together; 0 where there are none to look at."""
    flags = [flag for flags in self.dead.values() for flag in np.ravel(flags)]
    return float(np.mean(flags)) if flags else 0.0


def recording_activations(apply: ApplyFn, network: Network) -> ApplyFn:
  """Wrap `apply`: leave a histogram of every BatchNorm input, and which input channels of later layers are ever not zero.

  Args:
    apply: what to wrap; `observing` belongs inside, because it takes the place of the layers.
    network: its float network.
  """
  names = {layer.name for layer in intercept.matmul_layers(network)[1:]}

  def handle(module: nn.Module, x: Array, proceed: Callable[[Array], Any]) -> Any:
    y = proceed(x)  # refuses what has no single feature axis
    if isinstance(module, nn.BatchNorm):
      intercept.record(module, _COUNTS, _standardized_counts(module, x))
    else:
      intercept.record(module, _ALIVE, jnp.any(x != 0, axis=tuple(range(x.ndim - 1))))
    return y

  return intercept.intercept(
    apply, lambda module: isinstance(module, nn.BatchNorm) or intercept.layer_name(module) in names, handle
  )


def _standardized_counts(module: nn.BatchNorm, x: Array) -> Array:
  """i32[BINS + 2] of (x - running mean) / sqrt(running variance + eps)."""
  running = running_moments(module)
  assert isinstance(module.axis, int)
  x = jnp.moveaxis(jnp.asarray(x, jnp.float32), module.axis, -1)
  z = (x - running.mean) * jax.lax.rsqrt(running.var + module.epsilon)
  place = jnp.clip(jnp.floor((z + REACH) * (BINS / (2 * REACH))), -1, BINS).astype(jnp.int32) + 1
  return jnp.zeros(BINS + 2, jnp.int32).at[place.ravel()].add(1)


@functools.lru_cache(maxsize=16)
def _compiled(group: DeviceGroup, current: tuple[str, ...]) -> Callable[..., Any]:
  return group.compile(functools.partial(_observed, current=current))


def _observed(network: Network, images: Array, current: tuple[str, ...], axis_name: str | None) -> dict[str, Any]:
  """Of one batch: moments over all devices; counts, channels and answers of this device's images."""
  with jax.default_matmul_precision("highest"):
    inner = observing(network.forward, axis_name=axis_name, current=current)
    logits, mutated = recording_activations(inner, network)(network.variables, images)
  # nn.scan stacks its layers in front; a layer that is called several times leaves several values.
  counts = {name: jnp.stack(calls).sum(0) for name, calls in intercept.collect(mutated, _COUNTS).items()}
  alive = {name: jnp.stack(calls).any(0) for name, calls in intercept.collect(mutated, _ALIVE).items()}
  moments = over_devices(recorded_moments(mutated), axis_name)
  return {
    "moments": moments,
    "logits": logits,
    "counts": jax.tree.map(lambda leaf: leaf[None], counts),
    "alive": jax.tree.map(lambda leaf: leaf[None], alive),
  }


def observe_activations(
  network: Network,
  images: Array | np.ndarray,
  *,
  current: Sequence[str] = (),
  batch_size: int = 128,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
  should_stop: Callable[[], bool] = lambda: False,
) -> Activations:
  r"""Distributions of every BatchNorm layer's input over a set of images, in units of what the running statistics say.

  The histograms are of $z = (x - \hat\mu_c) / \sqrt{\hat\sigma_c^2 + \epsilon}$: on the data of the training z has mean 0 and
  variance 1 in every channel. The moments are pooled over the batches exactly, $\mu = \sum_b n_b \mu_b / n$,
  $\sigma^2 = \sum_b n_b (\sigma_b^2 + (\mu_b - \mu)^2) / n$.

  Args:
    network: with `nn.BatchNorm`.
    images: f32[n,h,w,c] in [0,1], or noise; n >= 2.
    current: paths or regular expressions of the layers that normalize with the statistics of their batch, (".*",) for all;
      the others use the running ones. What a layer is fed with depends on what those before it used.
    batch_size: images a batch, over all devices; the set is cut into batches as equal as possible, of sizes that divide over
      the devices (what is left over is not looked at). Of influence where layers use the statistics of the batch.
    devices: number of devices of each process, devices, or None (all accelerators, or one CPU a process). Every process
      looks at all the images.
    should_stop: asked between batches.

  Returns:
    Activations.

  Raises:
    NoBatchNormError: the network has no BatchNorm.
    DataError: there are fewer than two images a device, or a batch has no room for them.
    KwjaxError: `current` names no layer.
    NonFiniteError: the network's answers are NaN or infinite.
    Interrupted: `should_stop` said so, in any process.

  Source: Raikwar & Mishra (2022), "Discovering and Overcoming Limitations of Noise-engineered Data-free Knowledge Distillation".
  """
  reference, names = reference_moments(network), intercept.batch_norm_layers(network)
  unknown = [pattern for pattern in current if not any(matches(name, [pattern]) for name in names)]
  if unknown:
    raise KwjaxError(f"no BatchNorm layer of {network.name} matches {unknown}; there are {', '.join(names[:8])}, ...")
  group = device_group(devices).local
  usable = len(images) - len(images) % group.size
  if usable < 2 * group.size or batch_size < 2 * group.size:
    raise DataError(
      f"distributions of activations need at least two images a device, found {len(images)} images and batches of "
      f"{batch_size} for {group.size} devices"
    )
  parts = math.ceil(usable / batch_size)
  edges = [group.size * (usable // group.size * i // parts) for i in range(parts + 1)]
  placed, forward = group.replicate(network), _compiled(group, tuple(current))
  pooled: dict[str, Pooled] = {}
  counts: dict[str, np.ndarray] = {}
  alive: dict[str, np.ndarray] = {}
  logits = []
  for start, end in itertools.pairwise(edges):
    found = forward(placed, group.shard(np.asarray(images[start:end], np.float32)))
    for name, moments in jax.device_get(group.first(found["moments"])).items():
      pooled[name] = merge(pooled.get(name), moments, end - start)
    for name, batch in group.unshard(found["counts"]).items():
      counts[name] = counts.get(name, 0) + batch.sum(0, dtype=np.int64)
    for name, batch in group.unshard(found["alive"]).items():
      alive[name] = alive.get(name, False) | batch.any(0)
    logits.append(group.unshard(found["logits"]).astype(np.float32))
    if not np.isfinite(logits[-1]).all():
      raise NonFiniteError(f"{network.name} returns NaN or infinite logits for images {start} to {end - 1}")
    if processes.any_stop(should_stop()):
      raise Interrupted("stopped while observing activations")
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
  """Layers that nn.scan stacks one by one, named `path[i]` as their moments are."""
  found: dict[str, np.ndarray] = {}
  for name, value in counts.items():
    rows = value.reshape(-1, value.shape[-1])
    found.update({name: rows[0]} if value.ndim == 1 else {f"{name}[{i}]": row for i, row in enumerate(rows)})
  return found
