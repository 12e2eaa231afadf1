"""Histograms of layer inputs, one per layer, streamed over images and merged exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.errors import KwjaxError
from kwjax.kernels.processor import computed_once
from kwjax.network import ApplyFn, Array, Network, Variables
from kwjax.quantization.extremes import observed_arithmetic
from kwjax.quantization.ranges import Interval, RangeTable
from kwjax.quantization.rules import QuantRules
from kwjax.quantization.weight_ranges import WeightClips, weight_clips
from kwjax.quantization.wrap import quantize_weights
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.forwarding import forward_rows
from kwjax.runtime.devices.parallel import Devices

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
  """Wrap `apply`: record counts i32[b, bins + 1] of the input of every chosen layer, image by image, the zeros last.

  Args:
    apply: what to wrap.
    network: its float network.
    edges: `{layer: (lowest, highest)}`, f32[] or f32[repeats] for stacked layers. Values outside count in the end bins.
    bins: number of bins.
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


def observe_histograms(
  network: Network,
  images: Array | np.ndarray,
  table: RangeTable,
  *,
  rules: QuantRules | None = None,
  bins: int = BINS,
  batch_size: int = 64,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Histogram]:
  """Distribution of the input of every convolution and dense layer over a set of images, in a second pass.

  Of several processes each forwards its share of the images, and all get the counts of all images.

  Args:
    network: the float network; BatchNorm runs in evaluation mode.
    images: f32[n,h,w,c] in [0,1].
    table: extremes of the same images, of `observe_ranges`; they are the edges.
    rules: quantize the weights by these rules first. Default: float weights, and the histograms serve any rules.
    bins: bins per layer.
    batch_size: most images forwarded at a time; no influence on the result.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    `{layer: Histogram}` in execution order.

  Raises:
    Interrupted: `should_stop` returned True, in any process.
  """
  edges = {name: Interval(*(jnp.asarray(e) for e in (lo.min(0), hi.max(0)))) for name, (lo, hi) in table.items()}
  rows = forward_rows(
    _counts,
    (network, {} if rules is None else weight_clips(network, rules), edges),
    images,
    batch_size=batch_size,
    description="histograms",
    devices=devices,
    progress=progress,
    should_stop=should_stop,
    options={"rules": rules, "bins": bins},
  )
  total: dict[str, np.ndarray] = {}
  for found in rows:
    for name, counts in found.items():
      total[name] = total.get(name, 0) + counts.sum(0, dtype=np.int64)
  summed = {name: processes.gather(total[name][None]).sum(0) for name in table}
  return {
    name: Histogram(
      np.asarray(edges[name].lo, np.float64), np.asarray(edges[name].hi, np.float64), counts[..., -1], counts[..., :-1]
    )
    for name, counts in summed.items()
  }


def _counts(
  placed: tuple[Network, WeightClips, dict[str, Interval]], images: Array, rules: QuantRules | None, bins: int
) -> dict[str, Array]:
  network, clips, edges = placed
  apply = network.forward if rules is None else quantize_weights(network.forward, network, rules, clips)
  with observed_arithmetic():
    _, mutated = recording_histograms(apply, network, edges, bins)(network.variables, images)
  # nn.scan stacks layers in front of the images.
  found = intercept.collect(mutated, _COUNTS)
  return {layer: jnp.moveaxis(jnp.stack(calls).sum(0), -2, 0) for layer, calls in found.items()}
