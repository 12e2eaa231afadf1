"""What a reconstruction changes of a student: kernels, their grids and the ranges, by layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp

from kwjax import intercept
from kwjax.network import Array
from kwjax.quantization.fake_quant import fake_quant
from kwjax.quantization.grids import Clip, Grid, Spacing, activation_grid
from kwjax.quantization.ranges import Interval, Ranges
from kwjax.quantization.rules import LayerRule
from kwjax.quantization.weight_ranges import kernel_path
from kwjax.quantization.wrap import QuantizedNetwork, kernel_grid
from kwjax.reconstruction.rounding import Step


class Values(NamedTuple):
  """What a reconstruction changes, by layer; the state in its checkpoints.

  Attributes:
    step: i32[], units done.
    bad_step: i32[], -1: a unit that fails is not stored.
    bad_term: i32[], 0.
    kernels: of layers with rounded weights.
    grids: of each of them.
    ranges: of layers with rounded inputs.
  """

  step: Array
  bad_step: Array
  bad_term: Array
  kernels: dict[str, Any]
  grids: dict[str, Spacing]
  ranges: dict[str, Interval]


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
  """The quantized layers of a student: their values, and the student and the weights that other values make.

  Attributes:
    student: as it was calibrated.
  """

  student: QuantizedNetwork

  @functools.cached_property
  def rules(self) -> Mapping[str, LayerRule]:
    """The rule of each layer."""
    return self.student.rules.resolve(self.student.network)

  @functools.cached_property
  def bits(self) -> dict[str, int]:
    """Bits of the layers with rounded inputs."""
    return {name: rule.activation_bits for name, rule in self.rules.items() if rule.activation_bits is not None}

  @functools.cached_property
  def _shapes(self) -> dict[str, intercept.Layer]:
    """The layers without what does not matter to a grid, so that those of one shape share a program."""
    return {
      layer.name: dataclasses.replace(layer, name="", input_shape=(), output_shape=())
      for layer in intercept.matmul_layers(self.student.network)
    }

  def initial(self) -> Values:
    """The values of the student."""
    params = flax.traverse_util.flatten_dict(dict(self.student.variables["params"]))
    kernels = {
      name: jnp.asarray(params[kernel_path(name)]) for name, rule in self.rules.items() if rule.weight_bits is not None
    }
    grids = {name: self.grid(name, kernel) for name, kernel in kernels.items()}
    spacings = {name: Spacing(jnp.asarray(grid.scale), jnp.asarray(grid.zero)) for name, grid in grids.items()}
    ranges = {name: self.student.ranges[name] for name in self.bits}
    return Values(jnp.int32(0), jnp.int32(-1), jnp.int32(0), kernels, spacings, ranges)

  def grid(self, name: str, kernel: Array) -> Grid:
    """The grid on which the student rounds a kernel."""
    clip, spacing = self.student.clips.get(name), self.student.grids.get(name)
    return _grid_of(kernel, self._shapes[name], self.rules[name], clip, spacing)

  def step(self, name: str, interval: Interval) -> Step:
    """The step of the activations whose range this is."""
    return _step_of(interval, self.bits[name])

  def student_with(self, values: Values) -> QuantizedNetwork:
    """The student with new weights, grids and ranges."""
    order = [name for name in self.student.ranges if name in values.ranges]
    return self.student.replace(
      variables=self._variables({name: jnp.asarray(kernel) for name, kernel in values.kernels.items()}),
      grids={name: Spacing(*map(jnp.asarray, spacing)) for name, spacing in values.grids.items()},
      ranges=Ranges({name: values.ranges[name] for name in order}),
    )

  def rounded(self, names: Sequence[str], values: Values) -> dict[str, Any]:
    """Variables of the student in which the kernels of some layers lie on the grids of `values`."""
    kernels = {}
    for name in names:
      if name in values.kernels:
        kernel = jnp.asarray(values.kernels[name])
        kernels[name] = _rounded(kernel, self._shapes[name], self.rules[name], values.grids[name])
    return self._variables(kernels)

  def _variables(self, kernels: Mapping[str, Array]) -> dict[str, Any]:
    params = flax.traverse_util.flatten_dict(dict(self.student.variables["params"]))
    params |= {kernel_path(name): kernel for name, kernel in kernels.items()}
    return {**self.student.variables, "params": flax.traverse_util.unflatten_dict(params)}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _grid_of(
  kernel: Array, layer: intercept.Layer, rule: LayerRule, clip: Clip | None, spacing: Spacing | None
) -> Grid:
  return kernel_grid(kernel, layer, rule, clip, spacing)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded(kernel: Array, layer: intercept.Layer, rule: LayerRule, spacing: Spacing) -> Array:
  return fake_quant(kernel, *kernel_grid(kernel, layer, rule, None, spacing))


@functools.partial(jax.jit, static_argnums=1)
def _step_of(interval: Interval, bits: int) -> Step:
  grid = activation_grid(*interval, bits)
  return Step(grid.scale, grid.zero)
