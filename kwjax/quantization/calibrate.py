"""Activation ranges from images: the extremes of every layer's input, averaged as the paper does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from kwjax import intercept
from kwjax.errors import DataError, KwjaxError, NonFiniteError
from kwjax.kernels import fewer_products
from kwjax.kernels.processor import computed_once
from kwjax.network import ApplyFn, Array, Network, Variables
from kwjax.quantization.histograms import Histogram, merge, observe_histograms
from kwjax.quantization.range_methods import histogram_ranges
from kwjax.quantization.ranges import Interval, Ranges, RangeTable
from kwjax.quantization.rules import QuantRules
from kwjax.quantization.weight_ranges import WeightClips, weight_clips
from kwjax.quantization.wrap import quantize_weights
from kwjax.runtime import processes
from kwjax.runtime.forwarding import forward_batches, in_parts
from kwjax.runtime.packing import Packed, pack_rows
from kwjax.runtime.parallel import DeviceGroup, device_group

Augment = Callable[[Array, Array], Array]
"""`(key, images f32[b,h,w,c]) -> images` of the same shape."""

_EXTREMES = "extremes"


def recording_extremes(apply: ApplyFn, network: Network) -> ApplyFn:
  """Wrap `apply`: leave the extremes f32[b] of every convolution's and dense layer's input, sample by sample."""
  names = {layer.name for layer in intercept.matmul_layers(network)}

  def wrapped(variables: Variables, images: Array) -> tuple[Array, Variables]:
    batch = images.shape[0]

    def handle(module: nn.Module, x: Array, proceed: Any) -> Any:
      if x.shape[0] % batch:
        raise KwjaxError(
          f"layer {intercept.layer_name(module)} cannot be calibrated: its input of shape {x.shape} does not keep the "
          f"{batch} samples apart along its first axis"
        )
      x = computed_once(x)
      rows = jax.lax.stop_gradient(x).astype(jnp.float32).reshape(batch, -1)
      # One reduction to both ends reads a row once, but XLA fuses what makes it into that: 3 times slower in a network.
      intercept.record(module, _EXTREMES, Interval(rows.min(1), rows.max(1)))
      return proceed(x)

    return intercept.intercept(apply, lambda module: intercept.layer_name(module) in names, handle)(variables, images)

  return wrapped


@functools.lru_cache(maxsize=16)
def _compiled_extremes(group: DeviceGroup, rules: QuantRules | None) -> Callable[..., Packed]:
  return group.compile(functools.partial(_extremes, rules=rules, group=group))


def _extremes(
  placed: tuple[Network, WeightClips],
  images: Array,
  rules: QuantRules | None,
  group: DeviceGroup,
  axis_name: str | None,
) -> Packed:
  network, clips = placed
  apply = network.forward if rules is None else quantize_weights(network.forward, network, rules, clips)

  def forward(part: Array) -> Packed:
    with fewer_products():
      _, mutated = recording_extremes(apply, network)(network.variables, part)
    found = {}
    for layer, calls in intercept.collect(mutated, _EXTREMES).items():
      lo, hi = (jnp.stack(ends) for ends in zip(*calls, strict=True))
      # nn.scan stacks layers in front of the samples.
      found[layer] = Interval(jnp.moveaxis(lo.min(0), -1, 0), jnp.moveaxis(hi.max(0), -1, 0))
    return pack_rows(found)

  return in_parts(group, forward, images)


def check_images(network: Network, images: Any) -> None:
  """Refuse images that the network cannot have been meant for.

  Raises:
    DataError: there are none, their shape or type is wrong, or one holds NaN or infinity (by index).
  """
  shape = tuple(np.shape(images))
  if len(shape) != 4 or shape[1:] != network.image_shape:
    raise DataError(
      f"network {network.name} takes images of shape (n, {', '.join(map(str, network.image_shape))}), found {shape}"
    )
  if shape[0] == 0:
    raise DataError("calibration needs at least one image, found none")
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise DataError(f"calibration needs float images in [0, 1], found {images.dtype} (divide 8 bit images by 255)")
  finite = np.isfinite(np.asarray(images)).all((1, 2, 3))
  if not finite.all():
    raise DataError(
      f"image {int(np.argmin(finite))} of the calibration set holds NaN or infinity ({int((~finite).sum())} do)"
    )


def observe_ranges(
  network: Network,
  images: Array | np.ndarray,
  *,
  rules: QuantRules | None = None,
  batch_size: int = 64,
  progress: bool = False,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
  should_stop: Callable[[], bool] = lambda: False,
) -> RangeTable:
  """Lowest and highest input of every convolution and dense layer for every image, BatchNorm in evaluation mode.

  Of several processes each forwards its share of the images, and all get the whole table.

  Args:
    network: the float network.
    images: f32[n,h,w,c] in [0,1].
    rules: quantize the weights by these rules first; default: float weights, and the table serves any rules.
    batch_size: images forwarded at a time at most (CPUs take fewer large ones); no influence on the result.
    progress: show a bar.
    devices: number of devices of each process, devices, or None (all accelerators, or one CPU a process).
    should_stop: asked between batches.

  Returns:
    RangeTable, f32[n] a layer, in execution order.

  Raises:
    DataError: there are no images, or they are unfit.
    NonFiniteError: a layer's input is NaN or infinite for some image.
    Interrupted: `should_stop` said so, in any process.
  """
  check_images(network, images)
  group = device_group(devices).local
  placed = group.replicate_constants((network, {} if rules is None else weight_clips(network, rules)))
  batches = forward_batches(
    _compiled_extremes(group, rules),
    placed,
    images,
    group,
    batch_size=batch_size,
    words="calibration",
    progress=progress,
    should_stop=should_stop,
  )
  parts = [jax.tree.map(lambda rows, valid=valid: rows[valid], found) for found, valid in batches]
  joined = jax.tree.map(lambda *rows: processes.gather(np.concatenate(rows)), *parts).unpack()
  names = [layer.name for layer in intercept.matmul_layers(network)]
  for name in names:
    if not all(np.isfinite(end).all() for end in joined[name]):
      raise NonFiniteError(f"the input of layer {name} of {network.name} is NaN or infinite for some calibration image")
  return RangeTable({name: joined[name] for name in names})


def draws(key: Array, *, steps: int, batch_size: int, count: int) -> np.ndarray:
  """Indices i32[steps, batch_size] of the images that each calibration step sees, drawn with replacement."""

  def draw(step: Array) -> Array:
    return jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, count)

  return np.asarray(jax.vmap(draw)(jnp.arange(steps)))


def _average(
  table: Mapping[str, tuple[Any, Any]], rules: QuantRules, chunk: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Mean over chunks of the extremes over a chunk, float64; a chunk of one sample is the reading "sample"."""
  chunk = chunk if rules.ranges == "chunk" else 1

  def mean(end: Any, extreme: Callable) -> np.ndarray:
    values = np.asarray(end, np.float64)
    return extreme(values.reshape(-1, chunk, *values.shape[1:]), axis=1).mean(0)

  return {layer: (mean(lo, np.min), mean(hi, np.max)) for layer, (lo, hi) in table.items()}


def _check_protocol(steps: int, batch_size: int, chunk: int) -> None:
  if min(steps, batch_size, chunk) < 1 or batch_size % chunk:
    raise KwjaxError(
      "calibration needs at least 1 step and a batch that divides into chunks, "
      f"found steps {steps}, batch size {batch_size}, chunk {chunk}"
    )


def ranges_from(
  table: RangeTable,
  rules: QuantRules,
  *,
  key: Array,
  steps: int = 200,
  batch_size: int = 256,
  chunk: int = 16,
) -> Ranges:
  """Ranges from the table of `observe_ranges`, as `calibrate` without augmentation: draws index rows of the table.

  Args:
    table: extremes of every image.
    rules: says how ranges are read ("sample" or "chunk").
    key: of the draws.
    steps: number of batches.
    batch_size: draws a batch.
    chunk: samples a chunk, a divisor of `batch_size`.

  Raises:
    KwjaxError: the table is empty, the numbers do not fit together, or the rules' ranges need histograms.
  """
  _check_protocol(steps, batch_size, chunk)
  if rules.needs_histograms:
    raise KwjaxError(
      f'range reading {rules.ranges!r} needs histograms, a table of extremes serves "sample" and "chunk"'
    )
  if table.count == 0:
    raise KwjaxError("the table of ranges holds no image")
  index = draws(key, steps=steps, batch_size=batch_size, count=table.count).reshape(-1)
  drawn = {layer: (np.asarray(lo)[index], np.asarray(hi)[index]) for layer, (lo, hi) in table.items()}
  return Ranges(_average(drawn, rules, chunk))


def calibrate(
  network: Network,
  images: Array | np.ndarray,
  rules: QuantRules,
  *,
  key: Array,
  steps: int = 200,
  batch_size: int = 256,
  chunk: int = 16,
  augment: Augment | None = None,
  observe: Literal["float", "weights"] = "float",
  progress: bool = False,
  devices: int | Sequence[jax.Device] | DeviceGroup | None = None,
) -> Ranges:
  r"""Activation range of every layer, one a tensor: the paper's calibration.

  $lo = \mathrm{mean}_{chunks} \min x$, $hi = \mathrm{mean}_{chunks} \max x$, the mean running over `steps` batches of
  `batch_size` images drawn with replacement; with `rules.ranges == "sample"` the extremes of each sample are averaged
  instead of those of each chunk.

  Without augmentation an image's extremes are the same at every draw: each image is forwarded once, and the draws are
  made on the table of extremes.

  The other readings of `rules.ranges` ("percentile", "mse", "entropy") are made from the distribution of the inputs over all
  images, in a second pass; without augmentation nothing is drawn, and every image counts alike.

  Args:
    network: the float network; BatchNorm runs in evaluation mode.
    images: f32[n,h,w,c] in [0,1], any n >= 1.
    rules: bits, and how ranges are read; the range that "mse" and "entropy" give depends on the layer's bits.
    key: PRNG key of the draws and of the augmentation.
    steps: number of batches.
    batch_size: images a batch.
    chunk: samples a chunk, a divisor of `batch_size`.
    augment: `(key, images) -> images`, applied to every batch; every draw is then forwarded.
    observe: the network whose activations are observed: with "float" or with quantized "weights".
    progress: show a bar.
    devices: number of devices of each process, devices, or None (all accelerators, or one CPU a process).

  Returns:
    Ranges, `{layer: (lo f32[], hi f32[])}` in execution order.

  Raises:
    DataError: there are no images, or they are unfit.
    RuleError: a rule matches no layer.
    KwjaxError: the batch does not divide into chunks, or a layer cannot be observed.

  Source: Haroush et al. (2020), "The Knowledge Within", 4.2.
  """
  _check_protocol(steps, batch_size, chunk)
  if observe not in ("float", "weights"):
    raise KwjaxError(f'observe must be "float" or "weights", found {observe!r}')
  rules.resolve(network)
  observed = rules if observe == "weights" else None
  if augment is None:
    table = observe_ranges(network, images, rules=observed, progress=progress, devices=devices)
    if not rules.needs_histograms:
      return ranges_from(table, rules, key=key, steps=steps, batch_size=batch_size, chunk=chunk)
    histograms = observe_histograms(network, images, table, rules=observed, progress=progress, devices=devices)
    return histogram_ranges(histograms, rules.resolve(network), rules.ranges)
  check_images(network, images)
  index = draws(key, steps=steps, batch_size=batch_size, count=len(images))
  shown = progress and processes.is_main()

  def batches() -> Iterator[Array]:
    for step in tqdm(range(steps), desc="calibration", unit="step", disable=not shown):
      # The draw has used the step's own key.
      augment_key = jax.random.fold_in(jax.random.fold_in(key, step), 1)
      yield augment(augment_key, jnp.asarray(images[index[step]]))

  if rules.needs_histograms:
    histograms = _augmented_histograms(network, batches, observed, devices)
    return histogram_ranges(histograms, rules.resolve(network), rules.ranges)
  tables = (observe_ranges(network, batch, rules=observed, devices=devices) for batch in batches())
  averages = [_average(table, rules, chunk) for table in tables]
  return Ranges({layer: tuple(np.mean([a[layer] for a in averages], axis=0)) for layer in averages[0]})


def _augmented_histograms(
  network: Network, batches: Callable[[], Iterator[Array]], rules: QuantRules | None, devices: Any
) -> dict[str, Histogram]:
  """Of all batches together, which are made and forwarded twice: the bins must be known before anything is counted."""
  extremes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
  for batch in batches():
    for name, (lo, hi) in observe_ranges(network, batch, rules=rules, devices=devices).items():
      before = extremes.get(name, (np.inf, -np.inf))
      extremes[name] = np.minimum(before[0], lo.min(0)), np.maximum(before[1], hi.max(0))
  table = RangeTable({name: (lo[None], hi[None]) for name, (lo, hi) in extremes.items()})
  total: dict[str, Histogram] = {}
  for batch in batches():
    for name, found in observe_histograms(network, batch, table, rules=rules, devices=devices).items():
      total[name] = merge(total[name], found) if name in total else found
  return total
