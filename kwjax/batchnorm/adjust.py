"""Running statistics anew from images, and which layers keep theirs: the BatchNorm side of distillation from noise."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.batchnorm.moments import Moments, Pooled, merge
from kwjax.batchnorm.observe import no_batch_norm, observe
from kwjax.errors import DataError, KwjaxError
from kwjax.network import Network
from kwjax.runtime.parallel import DeviceGroup, device_group

_EVERY_LAYER = (".*",)


def current_layers(network: Network, running_fraction: float, key: jax.Array) -> tuple[str, ...]:
  """Names of the BatchNorm layers that shall use the statistics of the batch: all but a random share.

  ceil(P N) of the N layers, drawn without replacement, keep their running statistics; the others are returned, for
  `observe(current=)` and `DistillConfig(current=)`.

  Args:
    network: any network with `nn.BatchNorm`.
    running_fraction: P in [0, 1]; 0: all layers use the batch, 1: none.
    key: PRNG key of the draw.

  Returns:
    Layer names in execution order.

  Raises:
    NoBatchNormError: the network has no BatchNorm.
    KwjaxError: the fraction lies outside [0, 1].

  Source: Raikwar & Mishra (2022), "Discovering and Overcoming Limitations of Noise-engineered Data-free Knowledge
  Distillation", A.2.
  """
  if not 0.0 <= running_fraction <= 1.0:
    raise KwjaxError(f"the share of layers with running statistics must lie in [0, 1], found {running_fraction:g}")
  names = intercept.batch_norm_layers(network)
  if not names:
    raise no_batch_norm(network.name)
  kept = math.ceil(round(running_fraction * len(names), 6))
  keep = {int(index) for index in np.asarray(jax.random.permutation(key, len(names)))[:kept]}
  return tuple(name for index, name in enumerate(names) if index not in keep)


@functools.lru_cache(maxsize=16)
def _compiled(group: DeviceGroup) -> Callable[..., dict[str, Moments]]:
  return group.compile(_batch_statistics)


def _batch_statistics(network: Network, images: jax.Array, axis_name: str | None) -> dict[str, Moments]:
  # Every layer sees what it sees in training: inputs that the layers before it normalized with this very batch.
  return observe(network, images, axis_name=axis_name, current=_EVERY_LAYER)[1]


def adjust_statistics(
  network: Network,
  images: jax.Array | np.ndarray,
  *,
  batch_size: int = 256,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
) -> Network:
  r"""A copy whose running statistics are those of unlabelled images: the moments of all batches, pooled exactly.

  $\mu = \sum_b n_b \mu_b / n$, $\sigma^2 = \sum_b n_b (\sigma_b^2 + (\mu_b - \mu)^2) / n$, where each batch b runs through the
  network with its own statistics in every BatchNorm layer, as in training. The old statistics have no influence.

  Args:
    network: with `nn.BatchNorm`; its weights stay as they are.
    images: f32[n,h,w,c] in [0,1], n >= 2.
    batch_size: images a batch; the images are cut into batches as equal as possible, so that none is a batch of one. Sizes
      that divide over the devices only.
    devices: number of devices, devices, or None (all accelerators, or one CPU).

  Returns:
    The network with new `batch_stats`; `apply` then normalizes with them.

  Raises:
    NoBatchNormError: the network has no BatchNorm.
    DataError: there are fewer than two images a device.

  Source: Raikwar & Mishra (2022), section 4 (re-adjusting the running statistics of the student).
  """
  group = device_group(devices).local
  usable = len(images) - len(images) % group.size
  if len(images) < 2 * group.size or batch_size < 2 * group.size:
    raise DataError(
      f"statistics need at least two images a device, found {len(images)} images and batches of {batch_size} for "
      f"{group.size} devices"
    )
  parts = math.ceil(len(images) / batch_size)
  edges = [group.size * (usable // group.size * i // parts) for i in range(parts + 1)]
  placed = group.replicate(network)
  pooled: dict[str, Pooled] = {}
  for start, end in itertools.pairwise(edges):
    batch = np.asarray(images[start:end], np.float32)
    for layer, moments in jax.device_get(group.first(_compiled(group)(placed, group.shard(batch)))).items():
      pooled[layer] = merge(pooled.get(layer), moments, end - start)
  found = {name: Moments(jnp.asarray(p.mean), jnp.asarray(p.var)) for name, p in pooled.items()}
  return with_statistics(network, found)


def with_statistics(network: Network, moments: dict[str, Moments]) -> Network:
  """A copy with other running statistics: `{layer: Moments [c]}` as `observe` names them; other layers keep theirs."""
  flat = flax.traverse_util.flatten_dict(dict(network.variables["batch_stats"]))
  stacks: dict[str, dict[int, Moments]] = {}
  for name, value in moments.items():
    path, _, index = name.partition("[")
    stacks.setdefault(path, {})[int(index.rstrip("]") or 0)] = value
  for path, parts in stacks.items():
    prefix = () if path == "<top>" else tuple(path.split("/"))
    for field in ("mean", "var"):
      old = flat[(*prefix, field)]
      new = np.stack([getattr(parts[i], field) for i in sorted(parts)])
      flat[(*prefix, field)] = jnp.asarray(new, old.dtype).reshape(old.shape)
  batch_stats = flax.traverse_util.unflatten_dict(flat)
  return network.replace(variables={**network.variables, "batch_stats": batch_stats})
