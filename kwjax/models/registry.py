"""Every network by name: how to build it, and what its input means."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from kwjax.errors import KwjaxError
from kwjax.models import efficientnet_lite, layers
from kwjax.models.densenet import DenseNet
from kwjax.models.efficientnet_lite import EfficientNetLite
from kwjax.models.mobilenet import MobileNetV2
from kwjax.models.resnet import BasicBlock, Bottleneck, ResNet
from kwjax.models.resnet_cifar import CifarResNet
from kwjax.models.wide_resnet import WideResNet

Builder = Callable[..., nn.Module]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_CIFAR100_MEAN, _CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
  """What the published weights of a network expect and give.

  Attributes:
    name: the registry's name.
    family: networks of one family share their layer names.
    image_shape: (height, width, channels) of the training images, in pixels.
    num_classes: number of logits.
    input_mean: mean by channel of images in [0, 1]; the network reads (image - input_mean) / input_std.
    input_std: standard deviation by channel of images in [0, 1].
    batch_norm_momentum: weight of the old running statistics (Flax's convention).
    batch_norm_eps: added to the variance.
    description: one line for people.
  """

  name: str
  family: str
  image_shape: tuple[int, int, int]
  num_classes: int
  input_mean: tuple[float, float, float]
  input_std: tuple[float, float, float]
  batch_norm_momentum: float
  batch_norm_eps: float
  description: str


def _imagenet(name: str, family: str, description: str) -> ModelInfo:
  return ModelInfo(
    name,
    family,
    image_shape=(224, 224, 3),
    num_classes=1000,
    input_mean=_IMAGENET_MEAN,
    input_std=_IMAGENET_STD,
    batch_norm_momentum=layers.TORCH_MOMENTUM,
    batch_norm_eps=layers.TORCH_EPS,
    description=description,
  )


def _cifar10(name: str, family: str, description: str) -> ModelInfo:
  return dataclasses.replace(
    _imagenet(f"{name}_cifar", family, f"{description} with a stem for 32x32 images"),
    image_shape=(32, 32, 3),
    num_classes=10,
    input_mean=_CIFAR10_MEAN,
    input_std=_CIFAR10_STD,
  )


def _build_table() -> dict[str, tuple[ModelInfo, Builder]]:
  table: dict[str, tuple[ModelInfo, Builder]] = {}

  def add(info: ModelInfo, builder: Builder) -> None:
    table[info.name] = (info, builder)

  for depth in (20, 32, 44, 56, 110):
    # The public CIFAR-10 weights of these networks were trained with ImageNet's normalisation.
    text = f"ResNet-{depth} for CIFAR-10, shortcut option A (He et al. 2015)"
    info = dataclasses.replace(
      _imagenet(f"resnet{depth}", "resnet_cifar", text), image_shape=(32, 32, 3), num_classes=10
    )
    add(info, functools.partial(CifarResNet, (depth - 2) // 6))
  for depth, width in ((28, 10), (40, 2), (40, 1), (16, 1), (16, 2), (16, 8)):
    text = f"Wide ResNet {depth}-{width} for CIFAR-100 (Zagoruyko and Komodakis 2016)"
    info = dataclasses.replace(
      _imagenet(f"wrn{depth}_{width}", "wide_resnet", text),
      image_shape=(32, 32, 3),
      num_classes=100,
      input_mean=_CIFAR100_MEAN,
      input_std=_CIFAR100_STD,
    )
    add(info, functools.partial(WideResNet, (depth - 4) // 6, width))
  resnets: Mapping[int, tuple[tuple[int, int, int, int], type[BasicBlock] | type[Bottleneck]]] = {
    18: ((2, 2, 2, 2), BasicBlock),
    34: ((3, 4, 6, 3), BasicBlock),
    50: ((3, 4, 6, 3), Bottleneck),
    101: ((3, 4, 23, 3), Bottleneck),
  }
  for depth, (blocks, block) in resnets.items():
    text = f"ResNet-{depth} for ImageNet, torchvision's variant (He et al. 2015)"
    add(_imagenet(f"resnet{depth}", "resnet", text), functools.partial(ResNet, blocks, block))
    if block is BasicBlock:
      info = _cifar10(f"resnet{depth}", "resnet", f"ResNet-{depth} (He et al. 2015)")
      add(info, functools.partial(ResNet, blocks, block, small_images=True))
  add(_imagenet("mobilenet_v2", "mobilenet_v2", "MobileNetV2 for ImageNet (Sandler et al. 2018)"), MobileNetV2)
  info = _cifar10("mobilenet_v2", "mobilenet_v2", "MobileNetV2 (Sandler et al. 2018)")
  add(info, functools.partial(MobileNetV2, small_images=True))
  for depth, sizes in ((121, (6, 12, 24, 16)), (169, (6, 12, 32, 32))):
    text = f"DenseNet-{depth} for ImageNet (Huang et al. 2016)"
    add(_imagenet(f"densenet{depth}", "densenet", text), functools.partial(DenseNet, sizes))
    info = _cifar10(f"densenet{depth}", "densenet", f"DenseNet-{depth} (Huang et al. 2016)")
    add(info, functools.partial(DenseNet, sizes, small_images=True))
  lite = dataclasses.replace(
    _imagenet("efficientnet_lite0", "efficientnet_lite", "EfficientNet-Lite0 for ImageNet (Tan and Le 2019)"),
    input_mean=(127 / 255,) * 3,
    input_std=(128 / 255,) * 3,
    batch_norm_momentum=efficientnet_lite.MOMENTUM,
    batch_norm_eps=efficientnet_lite.EPS,
  )
  add(lite, EfficientNetLite)
  return table


_TABLE = _build_table()
_BUILT_IN = frozenset(_TABLE)


def register_model(info: ModelInfo, builder: Builder) -> None:
  """Make a network of your own known by its name in this process: to `get_model`, `load_network` and the experiments.

  Args:
    info: what its weights expect and give; the name in lower case, with "_" and not "-".
    builder: `(num_classes=int) -> module`, such as the class of the module.

  Raises:
    KwjaxError: the name is in another form, or that of a network of kwjax.
  """
  if info.name in _BUILT_IN or info.name != _normal(info.name):
    raise KwjaxError(f"a model of your own needs a new name like 'my_net', found {info.name!r}")
  _TABLE[info.name] = (info, builder)


def known_models() -> tuple[str, ...]:
  """Names that `get_model` and `model_info` take."""
  return tuple(_TABLE)


def _normal(name: str) -> str:
  return name.strip().lower().replace("-", "_")


def _entry(name: str) -> tuple[ModelInfo, Builder]:
  key = _normal(name)
  if key not in _TABLE:
    raise KwjaxError(f"unknown model {name!r}; the known ones are {', '.join(_TABLE)}")
  return _TABLE[key]


def model_info(name: str) -> ModelInfo:
  """Facts about a network by its name; case and '-' or '_' do not matter.

  Raises: KwjaxError for an unknown name, listing the known ones.
  """
  return _entry(name)[0]


def get_model(name: str, num_classes: int | None = None, **options: Any) -> nn.Module:
  """The Flax module of a network, without any weights.

  Its `__call__(x f32[b,h,w,c], train=False) -> f32[b,num_classes]` reads normalised images; see `model_info`.

  Args:
    name: one of `known_models()`; case and '-' or '_' do not matter.
    num_classes: number of logits; by default that of the published weights.
    **options: other attributes of the module, such as `dropout_rate`.

  Raises: KwjaxError for an unknown name (listing the known ones), an unknown option or a number of classes below 1.
  """
  info, builder = _entry(name)
  if num_classes is None:
    num_classes = info.num_classes
  if num_classes < 1:
    raise KwjaxError(f"model {info.name}: num_classes must be at least 1, found {num_classes}")
  module = builder(num_classes=num_classes)
  fields = {field.name for field in dataclasses.fields(module)} - {"parent", "name"}
  unknown = sorted(set(options) - fields)
  if unknown:
    known = ", ".join(sorted(fields - {"num_classes"}))
    raise KwjaxError(f"model {info.name}: unknown option {', '.join(unknown)}; the known ones are {known}")
  return module.clone(**options) if options else module
