"""Names of layers in other libraries. Each naming is a rule from a Flax path to a source name.

A Flax path is the PyTorch module path with runs of numbers joined to the name before them (`layer1_0/conv1` for
`layer1.0.conv1`) and leading underscores dropped, so the rules below need no list of layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Path = tuple[str, ...]
Rule = Callable[[Path], str]

_NUMBERS = re.compile(r"^(.+?)((?:_[0-9]+)+)$")
_NESTED_BLOCK = re.compile(r"^(block[0-9]+)_(layer_[0-9]+)$")
_DENSE_LAYER = re.compile(r"(denselayer[0-9]+\.(?:norm|conv))([12])$")
_BLOCK_INDEX = re.compile(r"^(?:blocks|features)_([0-9]+)$")

# Blocks in each stage: timm numbers blocks by stage, torchvision and the PyTorch port of EfficientNet count through.
_STAGES = {"mobilenet_v2": (1, 2, 3, 4, 3, 3, 1), "efficientnet_lite0": (1, 2, 2, 3, 3, 4, 1)}
_TIMM_TOP = {
  "mobilenet_v2": {
    "features_0_0": "conv_stem",
    "features_0_1": "bn1",
    "features_18_0": "conv_head",
    "features_18_1": "bn2",
    "classifier_1": "classifier",
  },
  "efficientnet_lite0": {"bn0": "bn1", "bn1": "bn2", "fc": "classifier"},
}
# Layers of one block in execution order: with an expansion (timm InvertedResidual) and without (DepthwiseSeparable).
_TIMM_EXPANDED = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
_TIMM_PLAIN = ("conv_dw", "bn1", "conv_pw", "bn2")
_OWN_EXPANDED = {
  "mobilenet_v2": ("conv_0_0", "conv_0_1", "conv_1_0", "conv_1_1", "conv_2", "conv_3"),
  "efficientnet_lite0": ("expand_conv", "bn0", "depthwise_conv", "bn1", "project_conv", "bn2"),
}
_OWN_PLAIN = {
  "mobilenet_v2": ("conv_0_0", "conv_0_1", "conv_1", "conv_2"),
  "efficientnet_lite0": ("depthwise_conv", "bn1", "project_conv", "bn2"),
}


def dotted(path: Path) -> str:
  """`("layer1_0", "downsample_0")` -> `layer1.0.downsample.0`: the inverse of the naming rule of the Flax modules."""
  parts: list[str] = []
  for part in path:
    nested = _NESTED_BLOCK.match(part)  # Wide-ResNet: block1.layer.0 is one Flax module, block1_layer_0
    for piece in nested.groups() if nested else (part,):
      numbered = _NUMBERS.match(piece)
      parts += [numbered[1], *numbered[2][1:].split("_")] if numbered else [piece]
  return ".".join(parts)


def _densenet(path: Path) -> str:
  return dotted(path) if path == ("classifier",) else f"features.{dotted(path)}"


def _densenet_published(path: Path) -> str:
  # torchvision's published DenseNet files have denselayer1.norm.1; its own loader renames them the same way.
  return _DENSE_LAYER.sub(r"\1.\2", _densenet(path))


def _shortcut_linear(path: Path) -> str:
  # The usual CIFAR versions of ResNet-18 and 34, older than torchvision's names.
  return dotted(path).replace("downsample.", "shortcut.").replace("fc", "linear")


def _underscored(path: Path) -> str:
  return ".".join(part if part.isdigit() else f"_{part}" for part in dotted(path).split("."))


def _timm_blocks(arch: str, paths: Iterable[Path]) -> Rule:
  """EfficientNet builder of timm: `blocks.STAGE.INDEX.conv_pw`, ..., with other names for blocks without expansion."""
  first = 1 if arch == "mobilenet_v2" else 0
  numbers = [(stage, index) for stage, count in enumerate(_STAGES[arch]) for index in range(count)]
  last_of_expanded = _OWN_EXPANDED[arch][0] if arch == "efficientnet_lite0" else _OWN_EXPANDED[arch][-1]
  expanded = {path[0] for path in paths if path[-1] == last_of_expanded}

  def rule(path: Path) -> str:
    top, block = _TIMM_TOP[arch], _BLOCK_INDEX.match(path[0])
    if len(path) == 1 or block is None:
      return top.get(path[0], dotted(path))
    stage, index = numbers[int(block[1]) - first]
    own, theirs = (_OWN_EXPANDED[arch], _TIMM_EXPANDED) if path[0] in expanded else (_OWN_PLAIN[arch], _TIMM_PLAIN)
    return f"blocks.{stage}.{index}.{theirs[own.index(path[1])]}"

  return rule


def namings(arch: str, paths: Iterable[Path]) -> dict[str, Rule]:
  """Known namings of an architecture, the original one first.

  Args:
    arch: name in `kwjax.models`.
    paths: Flax paths of the modules that own weights, without the leaf (`kernel`, `scale`, ...).

  Returns: rules from a Flax module path to the source's module name.
  """
  if arch.startswith("densenet"):
    return {"torchvision": _densenet, "torchvision (published file)": _densenet_published}
  if arch == "efficientnet_lite0":
    return {"efficientnet-lite-pytorch": _underscored, "timm": _timm_blocks(arch, paths)}
  if arch == "mobilenet_v2":
    return {"torchvision": dotted, "timm": _timm_blocks(arch, paths)}
  if re.fullmatch(r"resnet(18|34)_cifar", arch):
    return {"torchvision": dotted, "shortcut, linear": _shortcut_linear}
  return {"torchvision" if re.fullmatch(r"resnet(18|34|50|101)", arch) else "original": dotted}
