"""Foreign networks with random weights, and the inputs of their BatchNorm layers without kwjax's help."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.network import Network
from tests.foreign.modules import LiftedNet, NestedNet, PartialNet, SetupNet

MEAN, STD = 0.45, 0.25
# One channel and four, square and not, with BatchNorm on dense features (nested) and without.
STYLES: dict[str, tuple[nn.Module, tuple[int, int, int], dict[str, Any]]] = {
  "partials": (PartialNet(), (16, 12, 3), {"train": False}),
  "setup": (SetupNet(), (8, 12, 1), {"deterministic": True}),
  "lifted": (LiftedNet(), (8, 8, 4), {"train": False}),
  "nested": (NestedNet(), (8, 8, 3), {"is_training": False}),
}


class Style(NamedTuple):
  """A network, the arguments that put its module in evaluation mode, and eight images."""

  network: Network
  evaluation: dict[str, Any]
  images: jax.Array

  @property
  def module_input(self) -> jax.Array:
    """What the module itself is fed with."""
    return (self.images - MEAN) / STD

  @property
  def kernels(self) -> dict[str, jax.Array]:
    """`{layer: kernel}` of everything that has one, read off the parameters."""
    flat = flax.traverse_util.flatten_dict(self.network.variables["params"], sep="/")
    return {name.removesuffix("/kernel"): value for name, value in flat.items() if name.endswith("/kernel")}


def make_network(module: nn.Module, shape: tuple[int, int, int], evaluation: dict[str, Any], **options: Any) -> Network:
  """Random weights, with statistics and affine parameters of which none is trivial."""
  variables = jax.jit(functools.partial(module.init, **evaluation))(jax.random.key(0), jnp.zeros((1, *shape)))

  def shake(path: tuple, leaf: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(1), zlib.crc32(jax.tree_util.keystr(path).encode()) % 2**31)
    if path[-1].key in ("mean", "bias"):
      return 0.3 * jax.random.normal(key, leaf.shape)
    if path[-1].key in ("var", "scale"):
      return jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5)
    return leaf

  variables = jax.tree_util.tree_map_with_path(shake, variables)
  channels = shape[2]
  name = type(module).__name__
  return Network(
    module, variables, image_shape=shape, input_mean=[MEAN] * channels, input_std=[STD] * channels, name=name, **options
  )


@pytest.fixture(scope="module", params=list(STYLES))
def style(request: pytest.FixtureRequest) -> Style:
  module, shape, evaluation = STYLES[request.param]
  return Style(make_network(module, shape, evaluation), evaluation, jax.random.uniform(jax.random.key(3), (8, *shape)))


def batch_norm_inputs(style: Style) -> dict[str, np.ndarray]:
  """`{layer: f64[n,c]}`: what every BatchNorm was fed, from Flax's own record of what it returned, solved for the input.

  Layers under nn.scan, whose record Flax drops, come from a forward pass by hand.
  """
  module, variables = style.network.module, style.network.variables
  is_batch_norm: Callable[[nn.Module, str], bool] = lambda found, method: isinstance(found, nn.BatchNorm)
  apply = functools.partial(
    module.apply, capture_intermediates=is_batch_norm, mutable=["intermediates"], **style.evaluation
  )
  _, record = jax.jit(apply)(variables, style.module_input)
  returned = flax.traverse_util.flatten_dict(record.get("intermediates", {}), sep="/")
  statistics = flax.traverse_util.flatten_dict(variables["batch_stats"], sep="/")
  parameters = flax.traverse_util.flatten_dict(variables["params"], sep="/")
  found = {}
  for name, (y,) in returned.items():
    layer = name.removesuffix("/__call__")
    y = np.asarray(y, np.float64).reshape(-1, y.shape[-1])
    y = (y - np.asarray(parameters.get(f"{layer}/bias", 0.0))) / np.asarray(parameters.get(f"{layer}/scale", 1.0))
    epsilon = 1e-5  # Flax's default, and that of the ImageNet example
    found[layer] = y * np.sqrt(np.asarray(statistics[f"{layer}/var"]) + epsilon) + np.asarray(
      statistics[f"{layer}/mean"]
    )
  if isinstance(module, LiftedNet):
    found.update(jax.tree.map(np.float64, jax.jit(_scanned_inputs)(variables, style.module_input)))
  return found


def _scanned_inputs(variables: Any, x: jax.Array) -> dict[str, jax.Array]:
  """The stem and the two scanned blocks of `LiftedNet`, one after the other."""
  params, stats = variables["params"], variables["batch_stats"]
  x = nn.Conv(4, (1, 1)).apply({"params": params["stem"]}, x)
  found = {}
  for i in range(2):
    own, statistics = jax.tree.map(lambda leaf, i=i: leaf[i], (params["stack"], stats["stack"]))
    found[f"stack/BatchNorm_0[{i}]"] = x.reshape(-1, 4)
    norm, running = own["BatchNorm_0"], statistics["BatchNorm_0"]
    y = (x - running["mean"]) / jnp.sqrt(running["var"] + 1e-5) * norm["scale"] + norm["bias"]
    x = x + nn.Conv(4, (3, 3)).apply({"params": own["Conv_0"]}, y * nn.sigmoid(y))
  return found
