"""One call from a weight file to a `Network`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kwjax.errors import WeightsError
from kwjax.runtime.files import sha256_file
from weights_conversion.locations import locate
from weights_conversion.mapping import apply_plan, make_plan
from weights_conversion.torch_import import read_weights

if TYPE_CHECKING:
  from kwjax.network import Network

# timm normalizes EfficientNet-Lite with (x - 0.5) / 0.5, the original with (255 x - 127) / 128.
_TIMM_LITE_INPUT = 0.5


def convert(
  arch: str,
  source: str | os.PathLike[str],
  *,
  num_classes: int | None = None,
  input_mean: Sequence[float] | None = None,
  input_std: Sequence[float] | None = None,
  image_size: int | None = None,
  progress: bool = True,
) -> Network:
  """A `Network` with the weights of a PyTorch or safetensors file.

  Args:
    arch: name in `kwjax.models`.
    source: a path, a URL, `torchvision`, `torchvision:V2` or `demo`; see `weights_conversion.locations.locate`.
    num_classes: outputs of the classifier; None: the file's. A number that differs from the file's is an error.
    input_mean: mean that training subtracted from images in [0, 1], one value for each channel; None: the mean of the
      architecture's published weights.
    input_std: standard deviation that training divided by, one value for each channel; None as above.
    image_size: height and width in pixels; None: the architecture's.
    progress: show a progress bar while downloading.

  Returns: the network; its `source` records file name, sha256, URL, format and naming.

  Raises:
    WeightsError: the file cannot be found, downloaded or read, or does not fit the architecture.
    KwjaxError: the architecture is unknown, or mean and standard deviation are unusable.
  """
  from kwjax.models import get_model, model_info
  from kwjax.network import Network

  info = model_info(arch)
  arch = info.name  # the registry forgives case and hyphens
  if num_classes is not None and num_classes < 1:
    raise WeightsError(f"the number of classes must be at least 1, found {num_classes}")
  if image_size is not None and image_size < 1:
    raise WeightsError(f"the image size must be at least 1 pixel, found {image_size}")
  located = locate(arch, source, progress=progress)
  weights = read_weights(located.path)
  origin = f"{located.path} as {arch}"
  plan = make_plan(arch, weights.arrays, num_classes, origin)
  variables = apply_plan(plan, weights.arrays, origin)
  mean, std = info.input_mean, info.input_std
  if arch == "efficientnet_lite0" and plan.naming == "timm":
    mean = std = (_TIMM_LITE_INPUT,) * 3
  shape = info.image_shape if image_size is None else (image_size, image_size, info.image_shape[2])
  options = {"num_classes": plan.num_classes}
  return Network(
    get_model(arch, **options),
    variables,
    image_shape=shape,
    input_mean=mean if input_mean is None else input_mean,
    input_std=std if input_std is None else input_std,
    name=arch,
    arch=arch,
    model_options=options,
    source={
      "file": located.path.name,
      "sha256": sha256_file(located.path),
      "url": located.url,
      "format": weights.format,
      "naming": plan.naming,
      "nested_under": list(weights.nested_under),
      "prefix": weights.prefix,
      "tensors": len(plan.entries),
    },
  )
