"""How the inputs of layers are distributed: one histogram a layer, streamed over images and merged exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.errors import KwjaxError
from kwjax.kernels import fewer_products
from kwjax.kernels.processor import computed_once
from kwjax.network import ApplyFn, Array, Network, Variables
from kwjax.quantization.ranges import Interval, RangeTable
from kwjax.quantization.rules import QuantRules
from kwjax.quantization.weight_ranges import WeightClips, weight_clips
from kwjax.quantization.wrap import quantize_weights
from kwjax.runtime import processes
from kwjax.runtime.forwarding import forward_batches, in_parts
from kwjax.runtime.parallel import DeviceGroup, device_group

BINS = 2048

_EDGES = "histogram_edges"
_COUNTS = "histogram_counts"


class Histogram(NamedTuple):
  """How often each value occurs. Always: bin i holds the values other than 0 from lo + i w to lo + (i + 1) w.

  Attributes:
    lo: lower edge of the first bin, f64[], or f64[repeats] for a layer that nn.scan stacks; unit of the layer's input.
    hi: upper edge of the last bin, likewise; w = (hi - lo) / bins.
    zeros: values that are 0 exactly, which every activation grid represents exactly; i64[] or i64[repeats].
    counts: the others, i64[bins] or i64[repeats, bins].
  """

  lo: np.ndarray
  hi: np.ndarray
  zeros: np.ndarray
  counts: np.ndarray

  @classmethod
  def of(cls, values: Any, *, bins: int = BINS) -> Histogram:
    """The histogram of an array of any shape, from its least to its greatest value."""
    found = np.asarray(values, np.float64).ravel()
    counts, edges = np.histogram(found[found != 0], bins, (found.min(), found.max()))
    return cls(edges[0], edges[-1], np.asarray((found == 0).sum(), np.int64), counts.astype(np.int64))

  def single(self, index: tuple[int, ...]) -> Histogram:
    """That of one of the layers that nn.scan stacks; () for a layer that is not stacked."""
    return Histogram(*(np.asarray(field)[index] for field in self))

  @property
  def centres(self) -> np.ndarray:
    """Middle of every bin, f64[bins]; of a single layer."""
    edges = self.edges
    return (edges[1:] + edges[:-1]) / 2

  @property
  def edges(self) -> np.ndarray:
    """f64[bins + 1]; of a single layer."""
    return np.linspace(float(self.lo), float(self.hi), self.counts.shape[-1] + 1)


Histograms = Mapping[str, Histogram]
"""`{layer: Histogram}` in execution order."""


def merge(first: Histogram, second: Histogram) -> Histogram:
  """The histogram of the values of both; exact, because counts are integers.

  Raises:
    KwjaxError: their bins are not the same.
  """
  same = first.counts.shape == second.counts.shape and bool(
    np.all(first.lo == second.lo) and np.all(first.hi == second.hi)
  )
  if not same:
    raise KwjaxError(
      f"histograms with other bins cannot be merged: {first.counts.shape} from {first.lo} to {first.hi}, "
      f"{second.counts.shape} from {second.lo} to {second.hi}"
    )
  return first._replace(zeros=first.zeros + second.zeros, counts=first.counts + second.counts)


def recording_histograms(apply: ApplyFn, network: Network, edges: Mapping[str, Interval], bins: int) -> ApplyFn:
  """Wrap `apply`: leave counts i32[b, bins + 1] of every chosen layer's input, sample by sample, the zeros last.

  Args:
    apply: what to wrap.
    network: its float network.
    edges: `{layer: (lowest, highest)}`; f32[], or f32[repeats] for stacked layers. What is outside counts in the end bins.
    bins: their number.
  """

  def wrapped(variables: Variables, images: Array) -> tuple[Array, Variables]:
    batch = images.shape[0]

    def handle(module: nn.Module, x: Array, proceed: Any) -> Any:
      ends = intercept.provided(module, _EDGES)
      if ends is None:
        raise KwjaxError(
          f"layer {intercept.layer_name(module)} cannot be observed: its lifted transform does not pass on the batch_stats "
          "collection (give nn.scan or nn.vmap variable_axes={'batch_stats': 0})"
        )
      lo, hi = ends
      x = computed_once(x)
      rows = jax.lax.stop_gradient(x).astype(jnp.float32).reshape(batch, -1)
      width = jnp.where(hi > lo, (hi - lo) / bins, 1.0)
      place = jnp.clip(jnp.floor((rows - lo) / width), 0, bins - 1).astype(jnp.int32)
      place = jnp.where(rows == 0, bins, place) + (bins + 1) * jnp.arange(batch)[:, None]
      counts = jnp.zeros(batch * (bins + 1), jnp.int32).at[place.ravel()].add(1)
      intercept.record(module, _COUNTS, counts.reshape(batch, bins + 1))
      return proceed(x)

    inner = intercept.intercept(apply, lambda module: intercept.layer_name(module) in edges, handle)
    return inner(intercept.provide(variables, _EDGES, edges), images)

  return wrapped


@functools.lru_cache(maxsize=16)
def _compiled_counts(group: DeviceGroup, rules: QuantRules | None, bins: int) -> Callable[..., dict[str, Array]]:
  return group.compile(functools.partial(_counts, rules=rules, bins=bins, group=group))


def _counts(
  placed: tuple[Network, WeightClips, dict[str, Interval]],
  images: Array,
  rules: QuantRules | None,
  bins: int,
  group: DeviceGroup,
  axis_name: str | None,
) -> dict[str, Array]:
  network, clips, edges = placed
  apply = network.forward if rules is None else quantize_weights(network.forward, network, rules, clips)

  def forward(part: Array) -> dict[str, Array]:
    # As the extremes were found, which are the edges.
    with fewer_products():
      _, mutated = recording_histograms(apply, network, edges, bins)(network.variables, part)
    # nn.scan stacks layers in front of the samples.
    found = intercept.collect(mutated, _COUNTS)
    return {layer: jnp.moveaxis(jnp.stack(calls).sum(0), -2, 0) for layer, calls in found.items()}

  return in_parts(group, forward, images)


def observe_histograms(
  network: Network,
  images: Array | np.ndarray,
  table: RangeTable,
  *,
  rules: QuantRules | None = None,
  bins: int = BINS,
  batch_size: int = 64,
  progress: bool = False,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
  should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Histogram]:
  """The distribution of every convolution's and dense layer's input over a set of images, in a second pass.

  Of several processes each forwards its share of the images, and all get the whole counts.

  Args:
    network: the float network; BatchNorm runs in evaluation mode.
    images: f32[n,h,w,c] in [0,1].
    table: extremes of the same images, of `observe_ranges`; they are the edges.
    rules: quantize the weights by these rules first; default: float weights, and the histograms serve any rules.
    bins: bins a layer.
    batch_size: images forwarded at a time at most (CPUs take fewer large ones); no influence on the result.
    progress: show a bar.
    devices: number of devices of each process, devices, or None (all accelerators, or one CPU a process).
    should_stop: asked between batches.

  Returns:
    `{layer: Histogram}` in execution order.

  Raises:
    Interrupted: `should_stop` said so, in any process.
  """
  edges = {name: Interval(*(jnp.asarray(e) for e in (lo.min(0), hi.max(0)))) for name, (lo, hi) in table.items()}
  group = device_group(devices).local
  clips = {} if rules is None else weight_clips(network, rules)
  total: dict[str, np.ndarray] = {}
  for found, valid in forward_batches(
    _compiled_counts(group, rules, bins),
    group.replicate_constants((network, clips, edges)),
    images,
    group,
    batch_size=batch_size,
    words="histograms",
    progress=progress,
    should_stop=should_stop,
  ):
    for name, counts in found.items():
      total[name] = total.get(name, 0) + counts[valid].sum(0, dtype=np.int64)
  summed = {name: processes.gather(total[name][None]).sum(0) for name in table}
  return {
    name: Histogram(
      np.asarray(edges[name].lo, np.float64), np.asarray(edges[name].hi, np.float64), counts[..., -1], counts[..., :-1]
    )
    for name, counts in summed.items()
  }
