"""J_KL of a whole data set: how close it is to what a network was trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.batchnorm import INPUT, Moments, bns_loss, gaussian_kl, input_moments, observe, reference_moments
from kwjax.batchnorm.moments import Pooled, merge
from kwjax.errors import DataError
from kwjax.network import Network


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


@jax.jit
def _moments(network: Network, images: jax.Array) -> dict[str, Moments]:
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
) -> Similarity:
  r"""J_KL of a data set against a network's running statistics: streaming and exact.

  $J = \frac1N \sum_l \frac1{C_l} \sum_c KL(N(\hat\mu, \hat\sigma^2) || N(\tilde\mu, \tilde\sigma^2))$ with the moments of
  the whole set, pooled over batches in float64, every BatchNorm in evaluation mode.

  Args:
    network: any network with `nn.BatchNorm`, float or quantized.
    batches: images f32[n,h,w,c] in [0,1], or an iterable of such batches.
    include_input: count the images themselves as the layer `input`.
    batch_size: how an array is cut.

  Returns:
    Similarity.

  Raises:
    NoBatchNormError: the network has no BatchNorm.
    DataError: there are no images.

  Source: Haroush et al. (2020), section 3.1 and Appendix (similarity of data sets).
  """
  reference = reference_moments(network, include_input=include_input)
  if isinstance(batches, (np.ndarray, jax.Array)):
    # Parts as equal as possible: each further size would be compiled anew.
    batches = np.array_split(batches, max(1, math.ceil(len(batches) / batch_size)))
  pooled: dict[str, Pooled | None] = dict.fromkeys(reference)
  count = 0
  for batch in batches:
    if len(batch) == 0:
      continue
    moments = jax.device_get(_moments(network, jnp.asarray(batch, jnp.float32)))
    pooled = {layer: merge(pooled[layer], moments[layer], len(batch)) for layer in reference}
    count += len(batch)
  if count == 0:
    raise DataError("J_KL needs at least one image, found 0")
  measured = {
    layer: Moments(jnp.asarray(p.mean, jnp.float32), jnp.asarray(p.var, jnp.float32))
    for layer, p in pooled.items()
    if p is not None
  }
  per_layer = {layer: np.asarray(gaussian_kl(reference[layer], measured[layer])) for layer in reference}
  return Similarity(np.asarray(bns_loss(reference, measured)), per_layer, count)
