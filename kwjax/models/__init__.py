"""Networks in Flax Linen, NHWC, each matching its original layer for layer; none of them knows about compression.

`get_model(name)` builds one, `model_info(name)` says what its input means, `known_models()` lists the names, `register_model`
adds one of your own.
"""

from kwjax.models.densenet import DenseNet
from kwjax.models.efficientnet_lite import EfficientNetLite
from kwjax.models.mobilenet import MobileNetV2
from kwjax.models.registry import ModelInfo, get_model, known_models, model_info, register_model
from kwjax.models.resnet import ResNet
from kwjax.models.resnet_cifar import CifarResNet
from kwjax.models.wide_resnet import WideResNet

__all__ = [
  "CifarResNet",
  "DenseNet",
  "EfficientNetLite",
  "MobileNetV2",
  "ModelInfo",
  "ResNet",
  "WideResNet",
  "get_model",
  "known_models",
  "model_info",
  "register_model",
]
