"""One step of reconstructing a unit; pure, for one device and for many."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kwjax.network import Array
from kwjax.quantization.fake_quant import nearest_level
from kwjax.quantization.grids import Grid, Spacing
from kwjax.quantization.ranges import Interval
from kwjax.reconstruction.config import ReconstructConfig
from kwjax.reconstruction.rounding import Step, Weight, dropped, hard_levels, soft_kernel, split_weights, undecided
from kwjax.reconstruction.trace import Soft
from kwjax.reconstruction.units import Part
from kwjax.runtime.devices import parallel
from kwjax.runtime.devices.parallel import DeviceGroup

# All parameters as one vector: a third of the operations to compile.
_ADAM = optax.flatten(optax.scale_by_adam())

TERMS = ("the error of the unit", "the gradient")

Trained = dict[str, dict[str, Array]]
"""`{index of a layer: {"v": V, "log_scale": a, "log_step": a}}`, each where it is trained."""


class Given(NamedTuple):
  """What a unit's steps only read.

  Attributes:
    leaves: variables of the unit's program; those of kernels and steps are replaced.
    weights: of each layer with rounded weights, by its index.
    steps: of each layer with rounded inputs, by its index.
    channels: weights of the output's channels, f32[c] with a mean of 1.
  """

  leaves: list[Array]
  weights: dict[str, Weight]
  steps: dict[str, Step]
  channels: Array


class Rows(NamedTuple):
  """Rows of a unit's features.

  Attributes:
    quantized: inputs [b, ...] behind quantized units.
    exact: inputs [b, ...] of the float network.
    target: outputs [b, ...] of the float network.
  """

  quantized: Any
  exact: Any
  target: Any


class UnitState(NamedTuple):
  """A unit in training.

  Attributes:
    step: i32[], steps done.
    trained: what is optimized.
    optimizer: of Adam.
    bad_step: i32[], the first step at which a term was not finite, or -1.
    bad_term: i32[], which of `TERMS` it was.
  """

  step: Array
  trained: Trained
  optimizer: optax.OptState
  bad_step: Array
  bad_term: Array


@functools.partial(jax.jit, static_argnames="config")
def begin(
  kernels: Mapping[str, Array], grids: Mapping[str, Grid], steps: Mapping[str, Step], config: ReconstructConfig
) -> tuple[UnitState, dict[str, Weight]]:
  """State of a unit before its first step, and what of its kernels is not trained.

  Args:
    kernels: float kernels by the layer's index.
    grids: of each of them.
    steps: of the layers with rounded inputs.
    config: says what is trained.
  """
  trained: Trained = {}
  weights = {}
  for index, kernel in kernels.items():
    weights[index], v = split_weights(kernel, grids[index])
    trained.setdefault(index, {})["v"] = v
    if config.scale_rate > 0.0:
      trained[index]["log_scale"] = jnp.zeros_like(grids[index].scale)
  for index, step in steps.items():
    if config.step_rate > 0.0:
      trained.setdefault(index, {})["log_step"] = jnp.zeros_like(step.scale)
  optimizer = _ADAM.init(trained)
  return UnitState(jnp.int32(0), trained, optimizer, jnp.int32(-1), jnp.int32(0)), weights


def trained_step(step: Step, trained: Mapping[str, Array]) -> Step:
  """The levels of a layer's input as they are now."""
  return step._replace(scale=step.scale * jnp.exp(trained["log_step"])) if "log_step" in trained else step


def _filled(part: Part, trained: Trained, given: Given, keys: Mapping[str, Array], keep: Array) -> list[Array]:
  """The variables of the unit's program, with soft kernels and steps."""
  soft = {
    index: Soft(trained_step(step, trained.get(index, {})), keys[index], jnp.broadcast_to(keep, jnp.shape(step.scale)))
    for index, step in given.steps.items()
  }
  leaves: list[Any] = list(given.leaves)
  for position, (kind, index, *fields) in enumerate(role or (None, None) for role in part.roles):
    if kind == "kernel" and str(index) in given.weights:
      own = trained[str(index)]
      kernel = soft_kernel(given.weights[str(index)], own["v"], own.get("log_scale", 0.0))
      leaves[position] = kernel.astype(leaves[position].dtype)
    elif kind == "given":
      leaves[position] = functools.reduce(getattr, fields, soft[str(index)])
  return leaves


@jax.jit
def keys_of(key: Array, step: Array | int, steps: Mapping[str, Step]) -> dict[str, Array]:
  """Keys of one step: of the unit's input, "input", and of each layer with rounded inputs, one a scale of a stacked layer.

  They are made in a program of their own: in that of the step each would cost a second of compilation.

  Args:
    key: PRNG key of the unit.
    step: of the run.
    steps: of the layers with rounded inputs.
  """
  key = jax.random.fold_in(key, step)
  found = {"input": jax.random.fold_in(key, len(steps))}
  for position, (index, levels) in enumerate(steps.items()):
    own, shape = jax.random.fold_in(key, position), jnp.shape(levels.scale)
    found[index] = jax.random.split(own, shape) if shape else own
  return found


def channel_error(found: Array, wanted: Array, channels: Array) -> Array:
  """$\\sum_c w_c (y_c - \\hat y_c)^2$ averaged over positions, of each image; f32[b].

  Args:
    found: outputs [b, ..., c].
    wanted: the same of the float network.
    channels: w, f32[c].
  """
  error = jnp.square(found.astype(jnp.float32) - wanted.astype(jnp.float32)) * channels
  return error.sum(-1).reshape(len(error), -1).mean(1)


def unit_step(
  state: UnitState,
  rows: Rows,
  given: Given,
  keys: Mapping[str, Array],
  *,
  part: Part,
  config: ReconstructConfig,
  axis_name: str | None = None,
) -> tuple[UnitState, dict[str, Array]]:
  """One Adam step on the rounding offsets and the steps of a unit.

  Args:
    state: the unit, the same on every device.
    rows: of this device's images.
    given: what is not trained.
    keys: of `keys_of`.
    part: program of the unit in the soft form.
    config: how to train.
    axis_name: mapped axis of the devices.

  Returns:
    The next state and metrics f32[] over all devices: loss, error.

  Source: Li et al. (2021), "BRECQ", arXiv:2102.05426; Wei et al. (2022), "QDrop", arXiv:2203.05740.
  """
  if axis_name is not None:
    keys = jax.tree.map(lambda key: _folded(key, lax.axis_index(axis_name)), dict(keys))
  keep = jnp.float32(config.keep)
  x = dropped(keys["input"], keep, rows.exact, rows.quantized) if config.keep > 0.0 else rows.quantized
  weight, beta = config.regularizer_at(state.step)

  def loss_of(trained: Trained) -> tuple[Array, Array]:
    found = part(_filled(part, trained, given, keys, keep), x)
    error = channel_error(found, rows.target, given.channels).mean()
    open_offsets = sum((undecided(own["v"], beta) for own in trained.values() if "v" in own), jnp.float32(0.0))
    return error + weight * open_offsets, error

  (loss, error), gradient = parallel.value_and_grad_of_copy(loss_of, axis_name)(state.trained)
  error = parallel.mean(error, axis_name)
  directions, optimizer = _ADAM.update(gradient, state.optimizer)
  rates = config.rates_at(state.step)
  trained = {
    index: {name: value - rates[name] * directions[index][name] for name, value in own.items()}
    for index, own in state.trained.items()
  }
  is_bad = ~jnp.isfinite(jnp.stack([error, optax.tree.norm(gradient)]))
  first = jnp.any(is_bad) & (state.bad_step < 0)
  following = UnitState(
    step=state.step + 1,
    trained=trained,
    optimizer=optimizer,
    bad_step=jnp.where(first, state.step, state.bad_step),
    bad_term=jnp.where(first, jnp.argmax(is_bad).astype(jnp.int32), state.bad_term),
  )
  return following, {"loss": loss, "error": error}


def _folded(keys: Array, device: Array) -> Array:
  fold = lambda key: jax.random.fold_in(key, device)
  for _ in range(keys.ndim):
    fold = jax.vmap(fold)
  return fold(keys)


@functools.lru_cache(maxsize=64)
def compiled_step(
  group: DeviceGroup, part: Part, config: ReconstructConfig, is_resident: bool
) -> Callable[..., tuple[UnitState, dict[str, Array]]]:
  """`(state, features, chosen, given, keys)`: `unit_step` on rows that are chosen here or, off the devices, were chosen before.

  Units whose programs are equal share it.
  """

  def step(state: UnitState, features: Any, chosen: Any, given: Given, keys: Any, axis_name: str | None) -> Any:
    rows = jax.tree.map(lambda held: held[chosen], features) if is_resident else Rows(*chosen)
    return unit_step(state, rows, given, keys, part=part, config=config, axis_name=axis_name)

  return group.compile(step, donate=(0,))


class Ended(NamedTuple):
  """What a unit's steps have learned, as ordinary values by the layer's index.

  Attributes:
    kernels: on the levels of the grids.
    spacings: of the grids.
    intervals: of the inputs.
    changed: number of weights that are not on the level nearest to their float value.
  """

  kernels: dict[str, Array]
  spacings: dict[str, Spacing]
  intervals: dict[str, Interval]
  changed: Array


@functools.partial(jax.jit, static_argnames="bits")
def ended(
  trained: Trained,
  weights: Mapping[str, Weight],
  kernels: Mapping[str, Array],
  steps: Mapping[str, Step],
  bits: tuple[tuple[str, int], ...],
) -> Ended:
  """Folds what was trained into ordinary kernels, grids and ranges.

  Args:
    trained: after the last step.
    weights: of `begin`.
    kernels: the float kernels.
    steps: levels of inputs before the first step.
    bits: of the layers with rounded inputs, `(index, bits)`.
  """
  found = Ended({}, {}, {}, jnp.int32(0))
  for index, weight in weights.items():
    grid, kernel = weight.grid, kernels[index]
    levels = hard_levels(weight, trained[index]["v"])
    scale = grid.scale * jnp.exp(trained[index].get("log_scale", 0.0))
    found.kernels[index] = ((levels - grid.zero) * scale).astype(kernel.dtype)
    found.spacings[index] = Spacing(scale, jnp.asarray(grid.zero, jnp.float32))
    nearest = jnp.clip(nearest_level(kernel, grid.scale, grid.zero), grid.qmin, grid.qmax)
    found = found._replace(changed=found.changed + jnp.sum(nearest != levels))
  for index, count in bits:
    step = trained_step(steps[index], trained.get(index, {}))
    found.intervals[index] = Interval(-step.zero * step.scale, (2**count - 1 - step.zero) * step.scale)
  return found
