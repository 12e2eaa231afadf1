"""Networks as other people write them, in the styles that are about; none knows of kwjax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class PartialBlock(nn.Module):
  """Bottleneck whose convolution, normalization and activation are handed down, as in the ImageNet example of Flax."""

  filters: int
  conv: Any
  norm: Any
  act: Callable[[jax.Array], jax.Array]
  strides: tuple[int, int] = (1, 1)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    residual = x
    y = self.conv(self.filters, (1, 1))(x)
    y = self.act(self.norm()(y))
    y = self.conv(self.filters, (3, 3), self.strides)(y)
    y = self.act(self.norm()(y))
    y = self.conv(self.filters * 2, (1, 1))(y)
    y = self.norm(scale_init=nn.initializers.zeros_init())(y)
    if residual.shape != y.shape:
      residual = self.conv(self.filters * 2, (1, 1), self.strides, name="conv_proj")(residual)
      residual = self.norm(name="norm_proj")(residual)
    return self.act(residual + y)


class PartialNet(nn.Module):
  """Partials made in `__call__`, `train` with a default of True, half precision as an attribute."""

  num_classes: int = 5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
      axis_name="batch" if train else None,
    )
    x = conv(4, (3, 3), (2, 2), padding=[(1, 1), (1, 1)], name="conv_init")(x)
    x = nn.relu(norm(name="bn_init")(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    x = PartialBlock(4, conv=conv, norm=norm, act=nn.relu, strides=(2, 2))(x)
    x = jnp.mean(x, axis=(1, 2))
    x = nn.Dense(self.num_classes, dtype=self.dtype)(x)
    return jnp.asarray(x, self.dtype)


class SetupBlock(nn.Module):
  """Setup style: the layers are attributes, BatchNorm is told its mode when it is called."""

  width: int

  def setup(self) -> None:
    self.conv = nn.Conv(self.width, (3, 3))
    self.norm = nn.BatchNorm(momentum=0.8)

  def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
    return nn.leaky_relu(self.norm(self.conv(x), use_running_average=use_running_average))


class SetupNet(nn.Module):
  """A list of blocks, dropout, and a mode argument without a default; helpers beside `__call__`."""

  num_classes: int = 4

  def setup(self) -> None:
    self.blocks = [SetupBlock(4), SetupBlock(6)]
    self.dropout = nn.Dropout(0.5)
    self.classifier = nn.Dense(self.num_classes)

  def encode(self, x: jax.Array, deterministic: bool) -> jax.Array:
    for block in self.blocks:
      x = nn.avg_pool(block(x, use_running_average=deterministic), (2, 2), (2, 2))
    return self.dropout(x.reshape(x.shape[0], -1), deterministic=deterministic)

  def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
    return self.classifier(self.encode(x, deterministic))


class PreActivation(nn.Module):
  """Norm, activation, convolution, residual: what nn.scan and nn.remat are given."""

  width: int
  train: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
    y = nn.swish(nn.BatchNorm(use_running_average=not self.train)(x))
    return x + nn.Conv(self.width, (3, 3))(y), None


class MapBlock(nn.Module):
  """A block that returns a map alone, for nn.remat without nn.scan."""

  width: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = nn.Conv(self.width, (3, 3), (2, 2))(x)
    return nn.relu(nn.BatchNorm(use_running_average=not train)(y))


class LiftedNet(nn.Module):
  """Scanned, rematerialised, and scanned with rematerialised bodies."""

  num_classes: int = 3

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    x = nn.Conv(4, (1, 1), name="stem")(x)
    lifted = nn.scan(
      nn.remat(PreActivation, prevent_cse=False),
      variable_axes={"params": 0, "batch_stats": 0},
      split_rngs={"params": True},
      length=2,
    )
    x, _ = lifted(4, train, name="stack")(x, None)
    x = nn.remat(MapBlock, static_argnums=(2,))(6, name="stage")(x, train)
    return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


class Branch(nn.Module):
  """One level of nesting: a Sequential inside, GroupNorm beside BatchNorm."""

  width: int
  train: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.Sequential([nn.Conv(self.width, (3, 3)), nn.GroupNorm(num_groups=2), nn.relu])(x)
    y = nn.Conv(self.width, (3, 3), feature_group_count=self.width)(y)
    return nn.BatchNorm(use_running_average=not self.train)(y)


class Stage(nn.Module):
  """A second level of nesting, whose branches are joined along the channels."""

  train: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    branches = [Branch(width, self.train, name=f"branch{width}")(x) for width in (2, 4)]
    return nn.relu(jnp.concatenate(branches, axis=-1))


class NestedNet(nn.Module):
  """Blocks in blocks; BatchNorm on dense features before the classifier; LayerNorm too."""

  num_classes: int = 4

  @nn.compact
  def __call__(self, x: jax.Array, is_training: bool = False) -> jax.Array:
    x = Stage(is_training, name="stage")(x)
    x = nn.LayerNorm()(x.mean((1, 2)))
    x = nn.DenseGeneral(8, use_bias=False)(x)
    x = nn.BatchNorm(use_running_average=not is_training, use_bias=False, use_scale=False)(x)
    return nn.Dense(self.num_classes)(nn.tanh(x))


class TwoHeads(nn.Module):
  """Shares a trunk between two classifiers; the one that matters runs first."""

  form: str = "dict"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> Any:
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(nn.Conv(4, (3, 3), name="trunk")(x)))
    main = nn.Dense(5, name="main_head")(x.mean((1, 2)))
    y = nn.relu(nn.BatchNorm(use_running_average=not train, name="auxiliary_bn")(nn.Conv(3, (1, 1), name="mix")(x)))
    auxiliary = nn.Dense(2, name="auxiliary_head")(y.mean((1, 2)))
    if self.form == "nested":
      return x, {"main": main, "auxiliary": auxiliary}
    return {"main": main, "auxiliary": auxiliary} if self.form == "dict" else (main, auxiliary)
