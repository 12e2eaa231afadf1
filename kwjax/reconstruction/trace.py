"""The forward pass of a network as a program that says where each layer begins, in three forms.

A program is traced once for each form and number of images. `kwjax.reconstruction.units` cuts it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kwjax import intercept
from kwjax.errors import KwjaxError
from kwjax.network import Array, Network, Variables
from kwjax.quantization.fake_quant import fake_quant
from kwjax.quantization.grids import activation_grid
from kwjax.quantization.ranges import Interval
from kwjax.reconstruction.rounding import Step, dropped, rounded_to_steps

Form = Literal["float", "hard", "soft"]
"""float: nothing is rounded. hard: inputs are rounded as in `QuantizedNetwork`. soft: inputs are rounded to steps that have
a gradient, and each element keeps its float value with some probability."""

MARK = "kwjax:"
GIVEN = "reconstruction"


class Soft(NamedTuple):
  """What the soft form gives a layer with rounded inputs.

  Attributes:
    step: levels of the input.
    key: of the elements that keep their float value; for a stacked layer one each.
    keep: f32[] in [0, 1], the probability of that.
  """

  step: Step
  key: Array
  keep: Array


def given_variables(variables: Variables, given: Mapping[str, Interval | Soft]) -> Variables:
  """Variables with what each layer needs besides: its interval in the hard form, a `Soft` in the soft one."""
  return intercept.provide(variables, GIVEN, given)


def trace(
  network: Network, bits: Mapping[str, int], form: Form, variables: Variables, count: int
) -> jax.extend.core.ClosedJaxpr:
  """The program of `count` images; its arguments are `jax.tree.leaves(variables)`, then the images f32[count,h,w,c].

  Args:
    network: the float network, for its module.
    bits: of the input of each layer whose input is rounded.
    form: of the program.
    variables: of `given_variables`, or their shapes.
    count: number of images.
  """

  def handle(module: nn.Module, x: Array, proceed: Any) -> Any:
    name = intercept.layer_name(module)
    x = checkpoint_name(x, MARK + name)
    if form == "float" or name not in bits:
      return proceed(x)
    given = intercept.provided(module, GIVEN)
    if given is None:
      raise KwjaxError(f"the activation range of layer {name} does not reach it: its lifted transform drops it")
    if form == "hard":
      return proceed(fake_quant(x, *activation_grid(given.lo, given.hi, bits[name])))
    return proceed(dropped(given.key, given.keep, x, rounded_to_steps(x, given.step, bits[name])))

  layers = {layer.name for layer in intercept.matmul_layers(network)}
  apply = intercept.intercept(network.forward, lambda module: intercept.layer_name(module) in layers, handle)
  images = jax.ShapeDtypeStruct((count, *network.image_shape), jnp.float32)
  return jax.make_jaxpr(lambda v, x: apply(v, x)[0])(variables, images)


@functools.cache
def marks_in(eqn: Any) -> tuple[str, ...]:
  """Layers that begin in an equation, those of its inner programs included."""
  if eqn.primitive.name == "name":
    name = eqn.params["name"]
    return (name.removeprefix(MARK),) if name.startswith(MARK) else ()
  found: list[str] = []
  for inner in jax.extend.core.jaxprs_in_params(eqn.params):
    for each in inner.eqns:
      found += marks_in(each)
  return tuple(dict.fromkeys(found))
