"""Activation ranges from images, one per layer: the paper's calibration and others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.errors import KwjaxError
from kwjax.network import Array, Network
from kwjax.quantization.extremes import check_images, observe_ranges
from kwjax.quantization.histograms import Histogram, merge, observe_histograms
from kwjax.quantization.range_methods import histogram_ranges
from kwjax.quantization.ranges import Ranges, RangeTable
from kwjax.quantization.rules import QuantRules
from kwjax.runtime.devices.forwarding import progress_bar
from kwjax.runtime.devices.parallel import Devices

Augment = Callable[[Array, Array], Array]
"""`(key, images f32[b,h,w,c]) -> images` of the same shape."""


def draws(key: Array, *, steps: int, batch_size: int, count: int) -> np.ndarray:
  """Indices i32[steps, batch_size] of the images that each calibration step sees, drawn with replacement."""

  def draw(step: Array) -> Array:
    return jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, count)

  return np.asarray(jax.vmap(draw)(jnp.arange(steps)))


def _average(
  table: Mapping[str, tuple[Any, Any]], rules: QuantRules, chunk: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Mean over chunks of the extremes over a chunk, float64; the method "sample" has chunks of one image."""
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
  """Ranges from the table of `observe_ranges`; the same as `calibrate` without augmentation gives.

  Args:
    table: extremes of every image.
    rules: how ranges are read, "sample" or "chunk".
    key: PRNG key of the draws.
    steps: number of batches.
    batch_size: draws per batch.
    chunk: images per chunk, a divisor of `batch_size`.

  Raises:
    KwjaxError: the table is empty, the numbers do not fit together, or the rules' ranges need histograms.
  """
  _check_protocol(steps, batch_size, chunk)
  if rules.needs_histograms:
    raise KwjaxError(f'range method {rules.ranges!r} needs histograms, a table of extremes serves "sample" and "chunk"')
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
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> Ranges:
  r"""Activation range of every layer, one per tensor: the paper's calibration.

  $lo = \mathrm{mean}_{chunks} \min x$, $hi = \mathrm{mean}_{chunks} \max x$. The mean runs over `steps` batches of
  `batch_size` images drawn with replacement. With `rules.ranges == "sample"` the extremes of each image are averaged instead
  of those of each chunk.

  Without augmentation an image has the same extremes at every draw. Each image is then forwarded once, and the draws are
  made from the table of extremes.

  The other methods of `rules.ranges` ("percentile", "mse", "entropy") need the distribution of the inputs over all images,
  which takes a second pass. Without augmentation nothing is drawn then, and every image counts alike.

  Args:
    network: the float network; BatchNorm runs in evaluation mode.
    images: f32[n,h,w,c] in [0,1], any n >= 1.
    rules: bits, and how ranges are read. The ranges of "mse" and "entropy" depend on the layer's bits.
    key: PRNG key of the draws and of the augmentation.
    steps: number of batches.
    batch_size: images per batch.
    chunk: images per chunk, a divisor of `batch_size`.
    augment: `(key, images) -> images`, applied to every batch; every draw is then forwarded.
    observe: the network whose activations are observed: with "float" or with quantized "weights".
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    Ranges, `{layer: (lo f32[], hi f32[])}` in execution order.

  Raises:
    DataError: there are no images, or they do not fit the network.
    RuleError: a rule matches no layer.
    KwjaxError: the batch does not divide into chunks, or a layer cannot be observed.
    Interrupted: `should_stop` returned True, in any process.

  Source: Haroush et al. (2020), "The Knowledge Within", 4.2.
  """
  _check_protocol(steps, batch_size, chunk)
  if observe not in ("float", "weights"):
    raise KwjaxError(f'observe must be "float" or "weights", found {observe!r}')
  rules.resolve(network)
  where: dict[str, Any] = {
    "rules": rules if observe == "weights" else None, "devices": devices, "should_stop": should_stop
  }  # fmt: skip
  if augment is None:
    table = observe_ranges(network, images, progress=progress, **where)
    if not rules.needs_histograms:
      return ranges_from(table, rules, key=key, steps=steps, batch_size=batch_size, chunk=chunk)
    histograms = observe_histograms(network, images, table, progress=progress, **where)
    return histogram_ranges(histograms, rules.resolve(network), rules.ranges)
  check_images(network, images)
  index = draws(key, steps=steps, batch_size=batch_size, count=len(images))

  def batches() -> Iterator[Array]:
    for step in progress_bar(range(steps), "calibration", unit="step", progress=progress):
      # The draw has used the key of the step itself.
      augment_key = jax.random.fold_in(jax.random.fold_in(key, step), 1)
      yield augment(augment_key, jnp.asarray(images[index[step]]))

  if rules.needs_histograms:
    return histogram_ranges(_augmented_histograms(network, batches, where), rules.resolve(network), rules.ranges)
  averages = [_average(observe_ranges(network, batch, **where), rules, chunk) for batch in batches()]
  return Ranges({layer: tuple(np.mean([a[layer] for a in averages], axis=0)) for layer in averages[0]})


def _augmented_histograms(
  network: Network, batches: Callable[[], Iterator[Array]], where: Mapping[str, Any]
) -> dict[str, Histogram]:
  """Histograms of all batches together. They are made and forwarded twice: bins must be known before anything is counted."""
  extremes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
  for batch in batches():
    for name, (lo, hi) in observe_ranges(network, batch, **where).items():
      before = extremes.get(name, (np.inf, -np.inf))
      extremes[name] = np.minimum(before[0], lo.min(0)), np.maximum(before[1], hi.max(0))
  table = RangeTable({name: (lo[None], hi[None]) for name, (lo, hi) in extremes.items()})
  total: dict[str, Histogram] = {}
  for batch in batches():
    for name, found in observe_histograms(network, batch, table, **where).items():
      total[name] = merge(total[name], found) if name in total else found
  return total
