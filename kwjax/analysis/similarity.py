"""J_KL of a whole data set: how close it is to what a network was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.batchnorm import OUTLIER_NATS, Moments, bns_loss, gaussian_kl, observe, reference_moments, trimmed_jkl
from kwjax.batchnorm.moments import Pooled, merge_layers, over_processes
from kwjax.errors import DataError
from kwjax.network import Network
from kwjax.runtime.data import ImageData
from kwjax.runtime.devices.forwarding import forward_batches
from kwjax.runtime.devices.parallel import Devices


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

  def outliers(self) -> int:
    """Number of channels of more than `OUTLIER_NATS`."""
    return sum(int(np.sum(values > OUTLIER_NATS)) for values in self.per_layer.values())

  def channels(self) -> int:
    """Number of all channels."""
    return sum(values.size for values in self.per_layer.values())

  def trimmed(self) -> float:
    """J_KL without the outliers, see `kwjax.batchnorm.trimmed_jkl`; NaN if no channel is left."""
    return float(jax.jit(trimmed_jkl)(self.per_layer))  # op by op each layer's size would be compiled by itself


def owned_by_outliers(jkl: float, trimmed: float) -> bool:
  """Whether J_KL says little of most channels: more than a tenth of it is of the outliers."""
  return trimmed < 0.9 * jkl


def measure(
  network: Network,
  batches: Iterable[np.ndarray | jax.Array] | np.ndarray | jax.Array | ImageData,
  *,
  include_input: bool = False,
  batch_size: int = 256,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> Similarity:
  r"""J_KL of a data set against a network's running statistics: streaming and exact.

  $J = \frac1N \sum_l \frac1{C_l} \sum_c KL(N(\hat\mu, \hat\sigma^2) || N(\tilde\mu, \tilde\sigma^2))$ with the moments of
  the whole set, pooled over batches in float64, every BatchNorm in evaluation mode.

  Args:
    network: any network with `nn.BatchNorm`, float or quantized.
    batches: images f32[n,h,w,c] in [0,1], `ImageData`, or an iterable of batches f32[b,h,w,c]. Of several processes each
      forwards every so-manieth batch. All must give the same batches, and all get the result.
    include_input: count the images themselves as the layer `input`.
    batch_size: most images in a batch; an iterable's batches stay as they are.
    devices: number of devices per process, the devices, or None: all accelerators, or one CPU per process.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.

  Returns:
    Similarity.

  Raises:
    NoBatchNormError: the network has no BatchNorm.
    DataError: there are no images.
    Interrupted: `should_stop` returned True, in any process.

  Source: Haroush et al. (2020), section 3.1 and Appendix (similarity of data sets).
  """
  reference = reference_moments(network, include_input=include_input)
  pooled: dict[str, Pooled] = {}
  for moments, count in forward_batches(
    _moments,
    network,
    batches,
    batch_size=batch_size,
    description="similarity",
    devices=devices,
    progress=progress,
    should_stop=should_stop,
    options={"include_input": include_input},
    share=True,
  ):
    # The moments are equal on all devices.
    pooled = merge_layers(pooled, jax.tree.map(lambda value: value[0], moments), count)
  pooled = over_processes(pooled, reference)
  if not pooled:
    raise DataError("J_KL needs at least one image, found 0")
  measured = {
    layer: Moments(jnp.asarray(pooled[layer].mean, jnp.float32), jnp.asarray(pooled[layer].var, jnp.float32))
    for layer in reference
  }
  per_layer = {layer: np.asarray(gaussian_kl(reference[layer], measured[layer])) for layer in reference}
  count = int(next(iter(pooled.values())).samples)
  return Similarity(np.asarray(bns_loss(reference, measured)), per_layer, count)


def _moments(
  network: Network, images: jax.Array, weights: jax.Array | None, axis_name: str | None, include_input: bool
) -> dict[str, Moments]:
  """Moments of the images of all devices."""
  # These are statistics of statistics: the bfloat16 products of TPUs and TF32 of GPUs would show in the third digit.
  with jax.default_matmul_precision("highest"):
    return observe(network, images, axis_name=axis_name, include_input=include_input, weights=weights)[1]
