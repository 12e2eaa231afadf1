"""Cross-layer equalization: move scale between neighbouring layers where the network's function does not notice."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.errors import KwjaxError
from kwjax.network import Array, Network, Variables
from kwjax.quantization.weight_ranges import kernel_path

Criterion = Literal["weights", "activations"]
"""weights: of the first layer, its folded kernel's range by output channel. activations: of what lies between the layers, three
standard deviations above the mean by BatchNorm's parameters."""

_SCALABLE = ("Conv", "Dense")
_PROBES = 2
_FACTORS = (16.0, 256.0)
_TOLERANCE = 1e-3
_ROUNDS = 20
_SETTLED = 1e-4
_DEVIATIONS = 3.0


class Pair(NamedTuple):
  """Two layers between which a channel's scale can be moved.

  Attributes:
    first: path of the layer before.
    norm: path of the BatchNorm layer between them, which takes the scale up; None: the first layer itself does.
    second: path of the layer behind.
  """

  first: str
  norm: str | None
  second: str


class Pairs(NamedTuple):
  """What `find_pairs` found.

  Attributes:
    found: pairs, in execution order.
    unsupported: `{"first -> second": why not}` for other neighbours.
  """

  found: tuple[Pair, ...]
  unsupported: dict[str, str]


class Equalized(NamedTuple):
  """A network with the same function and other scales.

  Attributes:
    network: it.
    pairs: what was equalized.
    scales: `{second layer: f32[c]}`, what its input channels' weights were multiplied by.
    unsupported: neighbours that were left alone, and why.
  """

  network: Network
  pairs: tuple[Pair, ...]
  scales: dict[str, np.ndarray]
  unsupported: dict[str, str]


def find_pairs(network: Network, *, key: Array | None = None) -> Pairs:
  """Neighbours in execution order between which scaling a channel up and down again changes nothing, found by trying.

  Each candidate's channels are scaled by random factors of 16 to 256 and the next layer's weights by their inverses; where
  logits of random images stay the same, all that lies between is positively homogeneous (ReLU, pooling) and nothing else
  reads it. A ReLU6, a swish, or a residual addition shows.

  Args:
    network: the float network.
    key: of the random images and factors.

  Returns:
    Pairs.
  """
  candidates, unsupported = _candidates(network)
  key = jax.random.key(0) if key is None else key
  images = jax.random.uniform(jax.random.fold_in(key, 0), (_PROBES, *network.image_shape))
  forward = jax.jit(lambda variables: network.forward(variables, images)[0])
  with jax.default_matmul_precision("highest"):
    expected = forward(network.variables)
    allowed = _TOLERANCE * float(jnp.abs(expected).max())
    found = []
    for index, pair in enumerate(candidates):
      channels = _channels(network, pair)
      low, high = np.log(_FACTORS)
      factors = np.exp(jax.random.uniform(jax.random.fold_in(key, index + 1), (channels,), minval=low, maxval=high))
      moved = forward(_move(network, pair, 1 / np.asarray(factors)))
      # A NaN is no agreement.
      if float(jnp.abs(moved - expected).max()) <= allowed:
        found.append(pair)
      else:
        unsupported[f"{pair.first} -> {pair.second}"] = (
          "what lies between them is not positively homogeneous (ReLU6, swish), or is read elsewhere too"
        )
  return Pairs(tuple(found), unsupported)


def equalize(
  network: Network, *, criterion: Criterion = "activations", pairs: Sequence[Pair] | None = None
) -> Equalized:
  r"""The same function with ranges that are alike over the channels between two layers: cross-layer equalization.

  Channel i between two layers, of range $r^{(1)}_i$ before and weights of range $r^{(2)}_i$ behind, is divided by
  $s_i = \sqrt{r^{(1)}_i / r^{(2)}_i}$, in BatchNorm's scale and bias or in the first layer, and the second layer's weights are
  multiplied by it: both ranges become $\sqrt{r^{(1)}_i r^{(2)}_i}$. All pairs in turn, until nothing moves any more.

  With one weight grid an output channel, as here, the gain is in the second layer's weights and in the activations between.

  Args:
    network: the float network; calibrate and quantize what comes back.
    criterion: what $r^{(1)}$ is; "activations" falls back to the weights where there is no BatchNorm.
    pairs: those of `find_pairs`; default: all of them.

  Returns:
    Equalized; its network's logits are those of the network up to rounding.

  Raises:
    KwjaxError: the criterion is unknown.

  Source: Nagel et al. (2019), arXiv:1906.04721, 4.1.
  """
  if criterion not in ("weights", "activations"):
    raise KwjaxError(f'criterion must be "weights" or "activations", found {criterion!r}')
  chosen, unsupported = find_pairs(network) if pairs is None else (tuple(pairs), {})
  scales = {pair.second: np.ones(_channels(network, pair)) for pair in chosen}
  for _ in range(_ROUNDS):
    largest = 0.0
    for pair in chosen:
      step = _scale(network, pair, criterion)
      network = network.replace(variables=_move(network, pair, step))
      scales[pair.second] = scales[pair.second] * step
      largest = max(largest, float(np.abs(np.log(step)).max()))
    if largest < _SETTLED:
      break
  return Equalized(network, chosen, {name: s.astype(np.float32) for name, s in scales.items()}, unsupported)


def _candidates(network: Network) -> tuple[list[Pair], dict[str, str]]:
  """Neighbours whose kernels could be scaled, and reasons for the others."""
  sequence = [layer for layer in intercept.layers(network) if layer.is_matmul or layer.is_batch_norm]
  pairs, unsupported = [], {}
  for place, first in enumerate(sequence):
    if not first.is_matmul:
      continue
    following = sequence[place + 1 : place + 3]
    norm = following[0] if following and following[0].is_batch_norm else None
    second = (following[1:] if norm else following)[:1]
    if not second or not second[0].is_matmul:
      continue
    reason = _unscalable(first, second[0])
    if reason:
      unsupported[f"{first.name} -> {second[0].name}"] = reason
    else:
      pairs.append(Pair(first.name, norm.name if norm else None, second[0].name))
  return pairs, unsupported


def _unscalable(first: intercept.Layer, second: intercept.Layer) -> str | None:
  for layer in (first, second):
    if layer.kind not in _SCALABLE:
      return f"{layer.name} is a {layer.kind}"
    if layer.repeats > 1:
      return f"{layer.name} is stacked by nn.scan or nn.vmap"
  kernel = second.kernel_shape or ()
  channels = (first.kernel_shape or ())[-1]
  if second.groups not in (1, channels) or (second.groups > 1 and kernel[-1] != channels):
    return f"{second.name} has {second.groups} groups"
  if second.groups == 1 and kernel[-2] != channels:
    return f"{second.name} takes {kernel[-2]} channels, {first.name} gives {channels}"
  return None


@functools.lru_cache(maxsize=8)
def _by_name(layers: tuple[intercept.Layer, ...]) -> dict[str, intercept.Layer]:
  return {layer.name: layer for layer in layers}


def _layer(network: Network, name: str) -> intercept.Layer:
  return _by_name(intercept.layers(network))[name]


def _channels(network: Network, pair: Pair) -> int:
  return (_layer(network, pair.first).kernel_shape or ())[-1]


def _flat(variables: Variables) -> dict[tuple[str, ...], Any]:
  return flax.traverse_util.flatten_dict(dict(variables))


def _leaf(layer: str, leaf: str) -> tuple[str, ...]:
  return (*kernel_path(layer)[:-1], leaf)


def _move(network: Network, pair: Pair, scale: np.ndarray) -> dict[str, Any]:
  """Variables in which the channels between a pair are divided by `scale` and the weights behind multiplied by it."""
  flat = _flat(network.variables)
  scale = scale.astype(np.float32)
  if pair.norm is None:
    before = [_leaf(pair.first, "kernel"), _leaf(pair.first, "bias")]
  else:
    before = [_leaf(pair.norm, "scale"), _leaf(pair.norm, "bias")]
  for path in before:
    if ("params", *path) in flat:
      flat["params", *path] = flat["params", *path] / scale
  if pair.norm is not None and ("params", *before[0]) not in flat:
    # BatchNorm without a scale of its own: the network has no place for one.
    raise KwjaxError(f"BatchNorm layer {pair.norm} has no scale to be changed")
  path = ("params", *kernel_path(pair.second))
  flat[path] = flat[path] * _along_inputs(scale, _layer(network, pair.second))
  return flax.traverse_util.unflatten_dict(flat)


def _along_inputs(values: np.ndarray, layer: intercept.Layer) -> np.ndarray:
  """One value an input channel, shaped like the layer's kernel; a depthwise kernel has them on its last axis."""
  return values if layer.groups > 1 else values[:, None]


def _scale(network: Network, pair: Pair, criterion: Criterion) -> np.ndarray:
  """The divisor of each channel; 1 where one of the ranges is empty."""
  flat = _flat(network.variables)
  kernel = np.abs(np.asarray(flat["params", *kernel_path(pair.second)], np.float64))
  axes = tuple(range(kernel.ndim - 1)) if _layer(network, pair.second).groups > 1 else (*range(kernel.ndim - 2), -1)
  behind = kernel.max(axes)
  before = _range_before(flat, pair, criterion)
  usable = (before > 0) & (behind > 0)
  return np.where(usable, np.sqrt(np.where(usable, before, 1.0) / np.where(usable, behind, 1.0)), 1.0)


def _range_before(flat: Mapping[tuple[str, ...], Any], pair: Pair, criterion: Criterion) -> np.ndarray:
  def array(collection: str, layer: str, leaf: str) -> np.ndarray | None:
    value = flat.get((collection, *_leaf(layer, leaf)))
    return None if value is None else np.asarray(value, np.float64)

  kernel = array("params", pair.first, "kernel")
  assert kernel is not None
  if pair.norm is None:
    return np.abs(kernel).max(tuple(range(kernel.ndim - 1)))
  gain, bias = array("params", pair.norm, "scale"), array("params", pair.norm, "bias")
  variance = array("batch_stats", pair.norm, "var")
  assert gain is not None
  assert variance is not None
  if criterion == "activations":
    return np.maximum((0.0 if bias is None else bias) + _DEVIATIONS * np.abs(gain), 0.0)
  # BatchNorm's eps is not in its variables; it matters only for channels that hardly vary.
  deviation = np.sqrt(np.maximum(variance, 1e-5))
  return np.abs(kernel).max(tuple(range(kernel.ndim - 1))) * np.abs(gain) / deviation
