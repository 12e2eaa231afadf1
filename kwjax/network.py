"""A trained network as one immutable value: Flax module, variables, and normalization of the input."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from kwjax.errors import KwjaxError, WeightsError
from kwjax.modules import OutputPath, evaluation_arguments, hashable_module, output_path, select_logits
from kwjax.network_files import (
  DESCRIPTION_FILE,
  FORMAT,
  WEIGHTS_FILE,
  check_options,
  read_description,
  read_weights,
)

_MOST_LISTED = 20  # arrays in one message

Array = jax.Array
Variables = Mapping[str, Any]
ApplyFn = Callable[[Variables, Array], tuple[Array, Variables]]
"""`(variables, images f32[b,h,w,c] in [0,1]) -> (logits f32[b,k], mutated variables)`; what every wrapper takes and returns."""


class FrozenInfo(dict):
  """A JSON-able dict with a hash, so that a `Network` can be an argument of a jitted function."""

  def __hash__(self) -> int:  # type: ignore[override]
    return hash(json.dumps(self, sort_keys=True, default=str))


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """A trained network that takes images in [0, 1]; a pytree whose children are its variables.

  Invariant: the module sees `(images - input_mean) / input_std`. A network can be an argument of jitted functions.

  Attributes:
    module: any Flax Linen module; `__call__(x f32[b,h,w,c], ...) -> logits f32[b,k]`. Attributes that are lists become
      tuples.
    variables: `{"params": ..., "batch_stats": ...}`.
    image_shape: `(h, w, c)` of one image.
    input_mean: mean of the training data for each channel, in [0, 1] pixel units, length c.
    input_std: standard deviation for each channel, same units.
    name: the name in reports.
    arch: name in `kwjax.models`, or None for your own module.
    model_options: keyword arguments of `get_model` that rebuild the module.
    call_options: keyword arguments of every call; the default selects evaluation mode.
    source: where the weights come from (file, hash, URL).
    output: for a module that returns more than logits: the key or index of the logits, or a sequence of them for
      nested outputs. Layers that lead only to other outputs are not quantized.
  """

  module: nn.Module
  variables: Variables
  _: dataclasses.KW_ONLY
  image_shape: tuple[int, int, int]
  input_mean: Sequence[float]
  input_std: Sequence[float]
  name: str = "network"
  arch: str | None = None
  model_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  call_options: Mapping[str, Any] | None = None
  source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  output: OutputPath | str | int | None = None

  def __post_init__(self) -> None:
    shape = tuple(int(n) for n in self.image_shape)
    mean, std = (tuple(float(v) for v in values) for values in (self.input_mean, self.input_std))
    if len(shape) != 3 or min(shape) < 1:
      raise KwjaxError(f"image_shape must be (height, width, channels) of positive sizes, found {self.image_shape}")
    if len(mean) != shape[2] or len(std) != shape[2]:
      raise KwjaxError(
        f"input_mean and input_std need one value for each of {shape[2]} channels, found {len(mean)} and {len(std)}"
      )
    if not all(np.isfinite(mean)) or not all(np.isfinite(std)) or min(std) <= 0:
      raise KwjaxError(f"input_mean must be finite and input_std positive, found {mean} and {std}")
    options = evaluation_arguments(self.module) if self.call_options is None else self.call_options
    for field, value in (
      ("module", hashable_module(self.module)),
      ("image_shape", shape),
      ("input_mean", mean),
      ("input_std", std),
      ("model_options", FrozenInfo(self.model_options)),
      ("call_options", FrozenInfo(options)),
      ("source", FrozenInfo(self.source)),
      ("output", output_path(self.output)),
    ):
      object.__setattr__(self, field, value)

  def tree_flatten(self) -> tuple[tuple[Variables], tuple[Any, ...]]:
    """Children: the variables; everything else is static."""
    static = [getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "variables"]
    return (self.variables,), tuple(static)

  @classmethod
  def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Variables]) -> Network:
    """Rebuild without validation: JAX also unflattens with placeholders for leaves."""
    network = object.__new__(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.name != "variables"]
    for name, value in zip(names, static, strict=True):
      object.__setattr__(network, name, value)
    object.__setattr__(network, "variables", children[0])
    return network

  def forward(self, variables: Variables, images: Array) -> tuple[Array, Variables]:
    """The `ApplyFn` that wrappers build on: logits f32[b,k], and what interceptors recorded in `batch_stats`.

    On CPUs layers take their fast forms, see `kwjax.kernels`.

    Args:
      variables: as `self.variables`, or others of the same structure.
      images: f32[b,h,w,c] in [0,1].
    """
    from kwjax.kernels.layers import accelerated

    mean, std = jnp.asarray(self.input_mean, images.dtype), jnp.asarray(self.input_std, images.dtype)
    options = dict(self.call_options or {})

    def apply(variables: Variables, normalized: Array) -> tuple[Any, Variables]:
      return self.module.apply(variables, normalized, mutable=["batch_stats"], **options)

    returned, mutated = accelerated(apply)(variables, (images - mean) / std)
    return select_logits(returned, output_path(self.output), self.name), mutated

  def apply(self, images: Array | np.ndarray) -> Array:
    """Logits f32[b,k] of images f32[b,h,w,c] in [0,1], in evaluation mode.

    Raises:
      KwjaxError: a BatchNorm layer runs in training mode, so an answer would depend on the other images.
    """
    from kwjax.intercept import layers

    layers(self)
    return self.forward(self.variables, jnp.asarray(images))[0]

  def replace(self, **changes: Any) -> Network:
    """The same network with some fields changed."""
    return dataclasses.replace(self, **changes)

  @property
  def num_classes(self) -> int:
    """Number of logits."""
    image = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
    return int(jax.eval_shape(lambda variables, x: self.forward(variables, x)[0], self.variables, image).shape[1])


def flatten_variables(variables: Variables) -> dict[str, np.ndarray]:
  """Nested variables as `{"params/layer1_0/conv1/kernel": array}`."""
  flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
  return {name: np.asarray(value) for name, value in flat.items()}


def check_finite(variables: Variables, origin: str) -> None:
  """Refuse NaN, infinite weights and negative variances. A variance of zero, a dead channel, is accepted.

  Raises:
    WeightsError: naming `origin`, and every bad array by its path.
  """
  bad = []
  for name, value in flatten_variables(variables).items():
    if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
      bad.append(f"{name} ({int((~np.isfinite(value)).sum())} of {value.size} values are NaN or infinite)")
    elif name.startswith("batch_stats/") and name.endswith("/var") and (value < 0).any():
      bad.append(f"{name} ({int((value < 0).sum())} negative variances)")
  if bad:
    raise WeightsError(f"{origin} holds unusable weights: {_listed(bad)}")


def check_shapes(expected: Variables, found: Variables, origin: str) -> None:
  """Compare two trees of variables and report the differences in one error.

  Raises:
    WeightsError: with the number of misshapen, missing and unexpected arrays, and the shapes of the first ones.
  """
  want = {k: tuple(v.shape) for k, v in flax.traverse_util.flatten_dict(dict(expected), sep="/").items()}
  have = {k: tuple(v.shape) for k, v in flax.traverse_util.flatten_dict(dict(found), sep="/").items()}
  problems = [
    f"{name} expected {want[name]} found {have[name]}" for name in want if name in have and want[name] != have[name]
  ]
  problems += [f"missing {name} {want[name]}" for name in want if name not in have]
  problems += [f"unexpected {name} {have[name]}" for name in have if name not in want]
  if problems:
    raise WeightsError(f"{origin} does not fit the architecture: {_listed(problems)}")


def _listed(problems: Sequence[str]) -> str:
  """The first problems and the number of the others, so that a deep network gives no endless message."""
  more = len(problems) - _MOST_LISTED
  return "; ".join(problems[:_MOST_LISTED]) + (f"; and {more} more" if more > 0 else "")


def fingerprint(network: Network) -> str:
  """SHA-256 of all variables (names, shapes, types, bytes) and the input's normalization; 64 hexadecimal digits."""
  digest = hashlib.sha256(repr((network.image_shape, network.input_mean, network.input_std)).encode())
  for name, value in sorted(flatten_variables(network.variables).items()):
    digest.update(f"{name}{value.shape}{value.dtype}".encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  return digest.hexdigest()


def save_network(network: Network, folder: str | pathlib.Path) -> None:
  """Write `model.safetensors` and `network.json` into `folder`: no pickle, no code, each file replaced atomically.

  Raises:
    KwjaxError: the folder cannot be written.
  """
  from kwjax.runtime.files import atomic_write, write_sealed_json

  folder = pathlib.Path(folder)
  payload = safetensors.numpy.save(flatten_variables(network.variables))
  description = {
    "format": FORMAT,
    "name": network.name,
    "arch": network.arch,
    "model_options": dict(network.model_options),
    "call_options": dict(network.call_options or {}),
    "image_shape": list(network.image_shape),
    "input_mean": list(network.input_mean),
    "input_std": list(network.input_std),
    "source": dict(network.source),
    "weights_sha256": hashlib.sha256(payload).hexdigest(),
    **({} if network.output is None else {"output": list(output_path(network.output) or ())}),
  }
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise KwjaxError(f"cannot write a network to {folder}: {error.strerror}") from error
  atomic_write(folder / WEIGHTS_FILE, payload)
  write_sealed_json(folder / DESCRIPTION_FILE, description)


def load_network(folder: str | pathlib.Path, *, module: nn.Module | None = None) -> Network:
  """Read a network that `save_network` or `python -m weights_conversion` wrote.

  Args:
    folder: holds `model.safetensors` and `network.json`.
    module: the Flax module, if the architecture is not in `kwjax.models`.

  Raises:
    WeightsError: a file is missing or damaged, or the weights do not fit the module or contain NaN.
    KwjaxError: the architecture is unknown.
  """
  from kwjax.models import get_model

  folder = pathlib.Path(folder)
  description = read_description(folder)
  where = folder / DESCRIPTION_FILE
  weights = read_weights(folder / WEIGHTS_FILE, description.get("weights_sha256"))
  arch, options = description.get("arch"), description.get("model_options") or {}
  known_module = module is None
  if module is None:
    if not arch:
      raise WeightsError(f"{where} names no architecture: pass module= to load_network")
    if not isinstance(arch, str) or not isinstance(options, dict):
      raise WeightsError(f"{where}: arch must be a name and model_options a mapping, found {arch!r} and {options!r}")
    check_options(options, where)
    try:
      module = get_model(arch, **options)
    except TypeError as error:
      raise WeightsError(f"{where}: model_options {options} are not those of {arch}: {error}") from error
  try:
    network = Network(
      module,
      flax.traverse_util.unflatten_dict(weights, sep="/"),
      image_shape=description["image_shape"],
      input_mean=description["input_mean"],
      input_std=description["input_std"],
      name=str(description.get("name") or arch or folder.name),
      arch=arch,
      model_options=options,
      call_options=description.get("call_options"),
      source=description.get("source") or {},
      output=description.get("output"),
    )
  except KwjaxError as error:
    raise WeightsError(f"{where}: {error}") from error
  except (TypeError, ValueError, OverflowError) as error:
    raise WeightsError(f"{where} or {WEIGHTS_FILE} does not describe a network: {error}") from error
  expected = _expected_variables(network, where if known_module else None)
  check_shapes(expected, network.variables, str(folder / WEIGHTS_FILE))
  check_finite(network.variables, str(folder / WEIGHTS_FILE))
  return network


def _expected_variables(network: Network, where: pathlib.Path | None) -> Variables:
  """Shapes of the variables of a network's module. `where` is the file that named the module, for messages, or None."""
  image = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
  options = dict(network.call_options or {})
  try:
    return jax.eval_shape(lambda x: network.module.init(jax.random.key(0), x, **options), image)
  # Flax, JAX and the module raise many types of errors for sizes that do not fit.
  except Exception as error:
    if where is None:
      raise
    reason = (str(error).splitlines() or [""])[0][:200]
    raise WeightsError(
      f"{where} describes a network that cannot be built ({type(error).__name__}: {reason})"
    ) from error
