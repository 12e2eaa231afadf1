"""New running statistics from images, and a choice of layers that keep theirs, as distillation from noise needs them."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.batchnorm.moments import Moments, Pooled, merge_layers
from kwjax.batchnorm.observe import no_batch_norm, observe
from kwjax.errors import DataError, KwjaxError
from kwjax.network import Network
from kwjax.runtime.devices.forwarding import forward_batches
from kwjax.runtime.devices.parallel import Devices

_EVERY_LAYER = (".*",)


def current_layers(network: Network, running_fraction: float, key: jax.Array) -> tuple[str, ...]:
  """Names of the BatchNorm layers that use the statistics of the batch: all but a random share.

  ceil(P N) of the N layers are drawn without replacement and keep their running statistics. The others are returned, for
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


def adjust_statistics(
  network: Network,
  images: jax.Array | np.ndarray,
  *,
  batch_size: int = 256,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> Network:
  r"""The network with the statistics of unlabelled images: the moments of all batches, pooled exactly.

  $\mu = \sum_b n_b \mu_b / n$, $\sigma^2 = \sum_b n_b (\sigma_b^2 + (\mu_b - \mu)^2) / n$. Each batch b runs through the
  network with its own statistics in every BatchNorm layer, as in training. The old statistics have no influence.

  Args:
    network: with `nn.BatchNorm`; its weights stay as they are.
    images: f32[n,h,w,c] in [0,1], n >= 2.
    batch_size: most images in a batch, at least 2. The images are cut into batches as equal as possible, so that no batch
      holds a single image. The cut does not depend on the devices.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    The network with new `batch_stats`; `apply` then normalizes with them.

  Raises:
    NoBatchNormError: the network has no BatchNorm.
    DataError: there are fewer than two images, or the batch size is below 2.
    Interrupted: `should_stop` returned True, in any process.

  Source: Raikwar & Mishra (2022), section 4 (re-adjusting the running statistics of the student).
  """
  if len(images) < 2 or batch_size < 2:
    raise DataError(
      f"statistics need at least two images in a batch, found {len(images)} images and batches of {batch_size}"
    )
  pooled: dict[str, Pooled] = {}
  for moments, count in forward_batches(
    _batch_statistics,
    network,
    images,
    batch_size=batch_size,
    description="statistics",
    devices=devices,
    progress=progress,
    should_stop=should_stop,
  ):
    # The moments are equal on all devices.
    pooled = merge_layers(pooled, jax.tree.map(lambda value: value[0], moments), count)
  found = {name: Moments(jnp.asarray(p.mean), jnp.asarray(p.var)) for name, p in pooled.items()}
  return with_statistics(network, found)


def _batch_statistics(
  network: Network, images: jax.Array, weights: jax.Array | None, axis_name: str | None
) -> dict[str, Moments]:
  # Every layer sees what it sees in training: inputs that the layers before it normalized with this very batch.
  return observe(network, images, axis_name=axis_name, current=_EVERY_LAYER, weights=weights)[1]


def with_statistics(network: Network, moments: dict[str, Moments]) -> Network:
  """The network with other running statistics, `{layer: Moments [c]}` as `observe` names them; other layers keep theirs."""
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
