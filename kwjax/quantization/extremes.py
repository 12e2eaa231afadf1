"""The lowest and highest input of every layer, image by image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kwjax import intercept
from kwjax.errors import DataError, KwjaxError, NonFiniteError
from kwjax.kernels import fewer_products
from kwjax.kernels.processor import computed_once
from kwjax.network import ApplyFn, Array, Network, Variables
from kwjax.quantization.ranges import Interval, RangeTable
from kwjax.quantization.rules import QuantRules
from kwjax.quantization.weight_ranges import WeightClips, weight_clips
from kwjax.quantization.wrap import quantize_weights
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.forwarding import forward_rows
from kwjax.runtime.devices.packing import Packed, pack_rows
from kwjax.runtime.devices.parallel import Devices

_EXTREMES = "extremes"


def recording_extremes(apply: ApplyFn, network: Network) -> ApplyFn:
  """Wrap `apply`: record the extremes f32[b] of the input of every convolution and dense layer, image by image.

  Raises:
    KwjaxError: (in the forward pass) a layer's input does not keep the images apart.
  """
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
      # A single reduction to both ends reads a row once, but XLA fuses what makes the row into it: 3 times slower.
      intercept.record(module, _EXTREMES, Interval(rows.min(1), rows.max(1)))
      return proceed(x)

    return intercept.intercept(apply, lambda module: intercept.layer_name(module) in names, handle)(variables, images)

  return wrapped


def observe_ranges(
  network: Network,
  images: Array | np.ndarray,
  *,
  rules: QuantRules | None = None,
  batch_size: int = 64,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> RangeTable:
  """Lowest and highest input of every convolution and dense layer for every image, BatchNorm in evaluation mode.

  Of several processes each forwards its share of the images, and all get the whole table.

  Args:
    network: the float network.
    images: f32[n,h,w,c] in [0,1].
    rules: quantize the weights by these rules first. Default: float weights, and the table serves any rules.
    batch_size: most images forwarded at a time; no influence on the result.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    RangeTable, f32[n] per layer, in execution order.

  Raises:
    DataError: there are no images, or they do not fit the network.
    NonFiniteError: a layer's input is NaN or infinite for some image.
    Interrupted: `should_stop` returned True, in any process.
  """
  check_images(network, images)
  rows = forward_rows(
    _extremes,
    (network, {} if rules is None else weight_clips(network, rules)),
    images,
    batch_size=batch_size,
    description="calibration",
    devices=devices,
    progress=progress,
    should_stop=should_stop,
    options={"rules": rules},
  )
  joined = jax.tree.map(lambda *parts: processes.gather(np.concatenate(parts)), *rows).unpack()
  names = [layer.name for layer in intercept.matmul_layers(network)]
  for name in names:
    if not all(np.isfinite(end).all() for end in joined[name]):
      raise NonFiniteError(f"the input of layer {name} of {network.name} is NaN or infinite for some calibration image")
  return RangeTable({name: joined[name] for name in names})


def _extremes(placed: tuple[Network, WeightClips], images: Array, rules: QuantRules | None) -> Packed:
  network, clips = placed
  apply = network.forward if rules is None else quantize_weights(network.forward, network, rules, clips)
  with observed_arithmetic():
    _, mutated = recording_extremes(apply, network)(network.variables, images)
  found = {}
  for layer, calls in intercept.collect(mutated, _EXTREMES).items():
    lo, hi = (jnp.stack(ends) for ends in zip(*calls, strict=True))
    # nn.scan stacks layers in front of the images.
    found[layer] = Interval(jnp.moveaxis(lo.min(0), -1, 0), jnp.moveaxis(hi.max(0), -1, 0))
  return pack_rows(found)


@contextlib.contextmanager
def observed_arithmetic() -> Iterator[None]:
  """How products are rounded where inputs of layers are observed: ranges and histograms must agree.

  TF32 rounds to a thousandth, which would move what is observed. Winograd's form on CPUs rounds to a hundred thousandth.
  """
  with jax.default_matmul_precision("highest"), fewer_products():
    yield


def check_images(network: Network, images: Any) -> None:
  """Refuse images that the network was not made for.

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
