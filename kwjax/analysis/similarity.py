"""J_KL of a whole data set: how close it is to what a network was trained on."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.batchnorm import INPUT, Moments, bns_loss, gaussian_kl, input_moments, observe, reference_moments
from kwjax.batchnorm.moments import Pooled, merge
from kwjax.errors import DataError, Interrupted
from kwjax.network import Network
from kwjax.runtime import processes
from kwjax.runtime.parallel import DeviceGroup, device_group


@dataclasses.dataclass(frozen=True)
class Similarity:
  """J_KL of a data set.

  Attributes:
    jkl: f32[], Eq. (2)-(3): mean over layers of the mean over channels; lower is more similar.
    per_layer: `{layer: f32[c]}`, the divergence of each channel, in execution order.
    count: number of images.
  """

  jkl: np.ndarray
  per_layer: dict[str, np.ndarray]
  count: int

  def layer_means(self) -> dict[str, float]:
    """Divergence of each layer: the mean over its channels."""
    return {layer: float(np.mean(values)) for layer, values in self.per_layer.items()}


@functools.lru_cache(maxsize=16)
def _compiled_moments(group: DeviceGroup) -> Callable[..., dict[str, Moments]]:
  return group.compile(_moments)


def _moments(network: Network, images: jax.Array, axis_name: str | None) -> dict[str, Moments]:
  """Moments of this device's images alone: those of the set are pooled on the host, in float64."""
  # Statistics of statistics: the bfloat16 products of TPUs and TF32 of GPUs would show in the third digit.
  with jax.default_matmul_precision("highest"):
    _, measured = observe(network, images)
  measured[INPUT] = input_moments(images, network)
  return measured


def measure(
  network: Network,
  batches: Iterable[np.ndarray | jax.Array] | np.ndarray | jax.Array,
  *,
  include_input: bool = False,
  batch_size: int = 256,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
  should_stop: Callable[[], bool] = lambda: False,
) -> Similarity:
  r"""J_KL of a data set against a network's running statistics: streaming and exact.

  $J = \frac1N \sum_l \frac1{C_l} \sum_c KL(N(\hat\mu, \hat\sigma^2) || N(\tilde\mu, \tilde\sigma^2))$ with the moments of
  the whole set, pooled over batches in float64, every BatchNorm in evaluation mode.

  Args:
    network: any network with `nn.BatchNorm`, float or quantized.
    batches: images f32[n,h,w,c] in [0,1], or an iterable of such batches.
    include_input: count the images themselves as the layer `input`.
    batch_size: how an array is cut.
    devices: number of devices of each process, devices, or None (all accelerators, or one CPU a process). Of several
      processes each forwards every so-manieth batch; all must give the same batches, and all get the result.
    should_stop: asked between batches.

  Returns:
    Similarity.

  Raises:
    NoBatchNormError: the network has no BatchNorm.
    DataError: there are no images.
    Interrupted: `should_stop` said so, in any process.

  Source: Haroush et al. (2020), section 3.1 and Appendix (similarity of data sets).
  """
  reference = reference_moments(network, include_input=include_input)
  group = device_group(devices).local
  if isinstance(batches, (np.ndarray, jax.Array)):
    batches = _cut(batches, batch_size, group.size, processes.count())
  pooled: dict[str, Pooled | None] = dict.fromkeys(reference)
  placed, stopped = group.replicate(network), False
  for number, batch in enumerate(batches):
    if len(batch) == 0 or number % processes.count() != processes.index():
      continue
    images = np.asarray(batch, np.float32)
    for moments, count in _batch_moments(group, placed, images):
      pooled = {layer: merge(pooled[layer], moments[layer], count) for layer in reference}
    stopped = processes.stop_is_known(should_stop())
    if stopped:
      break
  if processes.any_stop(stopped):
    raise Interrupted("stopped while measuring J_KL")
  pooled = {layer: _of_all_processes(found, reference[layer]) for layer, found in pooled.items()}
  count = next((int(found.samples) for found in pooled.values() if found is not None), 0)
  if count == 0:
    raise DataError("J_KL needs at least one image, found 0")
  measured = {
    layer: Moments(jnp.asarray(p.mean, jnp.float32), jnp.asarray(p.var, jnp.float32))
    for layer, p in pooled.items()
    if p is not None
  }
  per_layer = {layer: np.asarray(gaussian_kl(reference[layer], measured[layer])) for layer in reference}
  return Similarity(np.asarray(bns_loss(reference, measured)), per_layer, count)


def _cut(images: np.ndarray | jax.Array, batch_size: int, devices: int, shares: int) -> list[np.ndarray | jax.Array]:
  """Batches that divide over the devices and are as equal as possible (each further size would be compiled anew), in a
  number that divides over the processes where there are enough images; what is left over comes last.
  """
  body = len(images) - len(images) % devices
  parts = math.ceil(len(images) / batch_size)
  parts = max(1, min(math.ceil(parts / shares) * shares, body // devices))
  edges = [devices * (body // devices * i // parts) for i in range(parts + 1)]
  return [images[a:b] for a, b in zip(edges, [*edges[1:], len(images)], strict=True)]


def _batch_moments(group: DeviceGroup, placed: Network, images: np.ndarray) -> Iterator[tuple[dict[str, Moments], int]]:
  """Moments of the parts of a batch with the number of images in each; no image is padding, none is left out."""
  each = len(images) // group.size
  if each:
    shares = jax.device_get(_compiled_moments(group)(placed, group.shard(images[: each * group.size])))
    for i in range(group.size):
      yield (shares if group.size == 1 else jax.tree.map(operator.itemgetter(i), shares)), each
  rest = images[each * group.size :]
  if len(rest):
    single = DeviceGroup(group.devices[:1])
    yield (
      jax.device_get(_compiled_moments(single)(single.replicate(group.first(placed)), single.shard(rest))),
      len(rest),
    )


def _of_all_processes(own: Pooled | None, like: Moments) -> Pooled | None:
  """The moments behind all processes' images, pooled in the order of the processes and so the same in each."""
  if processes.count() == 1:
    return own
  empty = np.zeros(np.shape(like.mean), np.float64)
  row = np.stack([empty, empty] if own is None else [own.mean, own.var])
  samples = processes.exchange(0.0 if own is None else own.samples)
  total: Pooled | None = None
  for (mean, var), count in zip(processes.gather(row[None]), samples, strict=True):
    if count:
      # Not as Moments of float32: each process has pooled in float64.
      total = merge(total, Moments(mean, var), count)
  return total
