"""Flax's method interceptors: change a layer's call from outside, and carry values in and out. No other file uses them.

Values travel as variables of the collection `batch_stats`, under reserved names. Every module with BatchNorm lifts this
collection through `nn.remat`, `nn.scan` and `nn.vmap`. A closure would leak tracers there, and `nn.scan` would drop a
collection of another name. Inside `nn.scan` the values are sliced and stacked along the layer axis.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol, cast

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from kwjax.errors import KwjaxError
from kwjax.modules import leaves_behind
from kwjax.network import ApplyFn, Array, Network, Variables
from kwjax.subclasses import note_passed_on, passing_on

_COLLECTION = "batch_stats"
_RECORD = "kwjax_out"
_PROVIDED = "kwjax_in"


class Forwardable(Protocol):
  """What analysis and training need of a network. `Network` and `QuantizedNetwork` provide it."""

  @property
  def name(self) -> str:
    """The name in reports."""
    ...

  @property
  def variables(self) -> Any:
    """Float parameters and running statistics."""
    ...

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(h, w, c) of one image."""
    ...

  def forward(self, variables: Any, images: Array) -> tuple[Array, Any]:
    """The `ApplyFn` that wrappers build on."""
    ...

  def apply(self, images: Array) -> Array:
    """Logits f32[b,k] of images f32[b,h,w,c] in [0,1]."""
    ...


Handler = Callable[[nn.Module, Array, Callable[[Array], Any]], Any]
"""`(module, first input, proceed) -> output`; `proceed(x)` runs the layer on x."""


def layer_name(module: nn.Module) -> str:
  """Path of a module's variables, `layer1_0/bn1`; the top module itself is `<top>`."""
  return "/".join(module.path) or "<top>"


def intercept(apply: ApplyFn, selects: Callable[[nn.Module], bool], handle: Handler) -> ApplyFn:
  """Wrap `apply` so that `handle` replaces the `__call__` of every selected module.

  Of a subclass of `nn.BatchNorm` it replaces BatchNorm's own.

  The interceptor is entered inside the returned function, so that jit traces it. Entered outside, it would have no effect
  on a function that was traced before.
  """

  def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    module = context.module
    if context.method_name != "__call__" or module.is_initializing() or not selects(module):
      return next_fun(*args, **kwargs)
    if isinstance(module, nn.BatchNorm):
      # What a subclass does around BatchNorm is its own: `handle` gets the call that it passes on.
      called = cast("functools.partial[Any]", context.orig_method)
      if inspect.unwrap(called.func) is not inspect.unwrap(nn.BatchNorm.__call__):
        return passing_on(module, lambda: next_fun(*args, **kwargs))
      note_passed_on(module)
    if not args and _first_parameter(type(module).__call__) is None:
      return next_fun(**kwargs)  # a module without input, such as a learned scale, is no layer
    if args:
      return handle(module, args[0], lambda x: next_fun(x, *args[1:], **kwargs))
    keyword = _first_parameter(type(module).__call__)
    if keyword is None or keyword not in kwargs:
      raise KwjaxError(f"layer {layer_name(module)} was called without its input {keyword!r}")
    return handle(module, kwargs[keyword], lambda x: next_fun(**{**kwargs, keyword: x}))

  def wrapped(variables: Variables, images: Array) -> tuple[Array, Variables]:
    with nn.intercept_methods(interceptor):
      return apply(variables, images)

  return wrapped


@functools.cache
def _first_parameter(call: Callable[..., Any]) -> str | None:
  names = list(inspect.signature(call).parameters)
  return names[1] if len(names) > 1 else None


def record(module: nn.Module, name: str, value: Any) -> None:
  """Store a pytree of arrays for `collect`, one for each call of the layer.

  Raises:
    KwjaxError: the module is inside a lifted transform that does not return `batch_stats`.
  """
  if not module.is_mutable_collection(_COLLECTION):
    raise KwjaxError(
      f"layer {layer_name(module)} cannot be observed: its lifted transform does not return the {_COLLECTION} collection "
      f"(give nn.scan or nn.vmap variable_axes={{'{_COLLECTION}': 0}})"
    )
  call = 0
  while module.has_variable(_COLLECTION, f"{_RECORD}:{name}:{call}"):
    call += 1
  module.put_variable(_COLLECTION, f"{_RECORD}:{name}:{call}", value)


def collect(mutated: Variables, name: str) -> dict[str, list[Any]]:
  """Values that `record` stored under `name`: `{layer: [value of call 0, value of call 1, ...]}`."""
  found: dict[str, dict[int, Any]] = {}

  def walk(node: Any, path: tuple[str, ...]) -> None:
    if not isinstance(node, Mapping):
      return
    for key, value in node.items():
      if key.startswith(f"{_RECORD}:{name}:"):
        found.setdefault("/".join(path) or "<top>", {})[int(key.rsplit(":", 1)[1])] = value
      elif not key.startswith(f"{_RECORD}:"):
        walk(value, (*path, key))

  walk(mutated.get(_COLLECTION, {}), ())
  return {layer: [calls[i] for i in sorted(calls)] for layer, calls in found.items()}


def provide(variables: Variables, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """Variables with a pytree of arrays attached to layers, for `provided` to read: `values` is `{layer: pytree}`."""
  flat = flax.traverse_util.flatten_dict(dict(variables.get(_COLLECTION, {})))
  for layer, value in values.items():
    path = () if layer == "<top>" else tuple(layer.split("/"))
    flat[(*path, f"{_PROVIDED}:{name}")] = value
  return {**variables, _COLLECTION: flax.traverse_util.unflatten_dict(flat)}


def provided(module: nn.Module, name: str) -> Any | None:
  """What `provide` attached to this layer under `name`, or None."""
  key = f"{_PROVIDED}:{name}"
  return module.get_variable(_COLLECTION, key) if module.has_variable(_COLLECTION, key) else None


@dataclasses.dataclass(frozen=True)
class Layer:
  """One module of a network, as it runs in the forward pass of one image.

  Attributes:
    name: path of its variables.
    kind: its class name.
    primitive: whether it is a layer of Flax (Conv, Dense, BatchNorm, ...), not a composite of layers.
    input_shape: shape of its first input for a batch of one.
    output_shape: shape of its output for a batch of one; () if the output is not one array.
    kernel_shape: shape of its `kernel`, or None.
    groups: feature groups of a convolution, else 1.
    repeats: how often nn.scan or nn.vmap stacks it, else 1.
    channel_axes: axes of the kernel, counted from the end, that index output channels.
    feeds_logits: whether the logits depend on its kernel. With several outputs, some kernels feed only others.
  """

  name: str
  kind: str
  primitive: bool
  input_shape: tuple[int, ...]
  output_shape: tuple[int, ...]
  kernel_shape: tuple[int, ...] | None
  groups: int = 1
  repeats: int = 1
  channel_axes: tuple[int, ...] = (-1,)
  feeds_logits: bool = True

  @property
  def is_matmul(self) -> bool:
    """Whether quantization rules apply to it: convolutions and dense layers that feed the logits."""
    return self.kernel_shape is not None and self.kind in _MATMULS and self.feeds_logits

  @property
  def is_batch_norm(self) -> bool:
    """Whether it holds running statistics."""
    return self.kind == nn.BatchNorm.__name__

  @property
  def multiplications(self) -> int:
    """Multiply-adds for one image."""
    if self.kernel_shape is None or not self.output_shape:
      return 0
    return math.prod(self.kernel_shape) * math.prod(self.output_shape[1:-1]) * self.repeats


_MATMULS = (
  nn.Conv.__name__,
  nn.Dense.__name__,
  nn.ConvLocal.__name__,
  nn.ConvTranspose.__name__,
  nn.DenseGeneral.__name__,
)


def kind_of(module: nn.Module) -> str:
  """Name of the Flax layer class that a module is or derives from, else of its own class."""
  for cls in (nn.BatchNorm, nn.Conv, nn.ConvTranspose, nn.ConvLocal, nn.DenseGeneral, nn.Dense):
    if isinstance(module, cls):
      return cls.__name__
  return type(module).__name__


def layers(network: Network) -> tuple[Layer, ...]:
  """Every module of a network in execution order, found by tracing one image; nothing is computed."""
  leaves, structure = jax.tree.flatten(dict(network.variables))
  shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
  return _trace_layers(network.tree_flatten()[1], structure, shapes)


@functools.lru_cache(maxsize=64)
def _trace_layers(
  static: tuple, structure: Hashable, shapes: tuple[tuple[tuple[int, ...], Any], ...]
) -> tuple[Layer, ...]:
  network = Network.tree_unflatten(static, ({},))
  variables = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*s) for s in shapes])
  found: dict[str, Layer] = {}

  def note(module: nn.Module, x: Any, proceed: Callable[[Any], Any]) -> Any:
    name = layer_name(module)
    is_batch_norm = isinstance(module, nn.BatchNorm)
    before = module.get_variable(_COLLECTION, "mean") if is_batch_norm else None
    y = proceed(x)
    if is_batch_norm and module.get_variable(_COLLECTION, "mean") is not before:
      raise KwjaxError(
        f"layer {name} of network {network.name} runs in training mode: pass Network(call_options=...) with the argument "
        "that selects evaluation mode, such as {'train': False}"
      )
    if name not in found:
      kernel = module.get_variable("params", "kernel") if module.has_variable("params", "kernel") else None
      found[name] = Layer(
        name=name,
        kind=kind_of(module),
        primitive=type(module).__module__.startswith("flax.") and not isinstance(module, nn.Sequential),
        input_shape=tuple(jnp.shape(x)) if isinstance(x, jax.Array) else (),
        output_shape=tuple(y.shape) if isinstance(y, jax.Array) else (),
        kernel_shape=tuple(kernel.shape) if kernel is not None else None,
        groups=int(getattr(module, "feature_group_count", 1)),
        repeats=_repeats(variables, module, kernel),
        channel_axes=_channel_axes(module),
      )
    return y

  apply = intercept(network.forward, lambda module: True, note)
  image = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
  jax.eval_shape(apply, variables, image)
  if network.output is None:
    return tuple(found.values())
  leaves = leaves_behind(lambda v, x: network.forward(v, x)[0], variables, image)
  feeding = {"/".join(path[1:-1]) or "<top>" for path in leaves if path[0] == "params" and path[-1] == "kernel"}
  return tuple(
    dataclasses.replace(layer, feeds_logits=layer.kernel_shape is None or layer.name in feeding)
    for layer in found.values()
  )


def _repeats(variables: Any, module: nn.Module, kernel: Any) -> int:
  """How often a kernel is stacked: it then has more axes outside the transform than inside."""
  if kernel is None:
    return 1
  outside = variables.get("params", {})
  for key in module.path:
    outside = outside.get(key, {}) if isinstance(outside, Mapping) else {}
  shape = getattr(outside.get("kernel") if isinstance(outside, Mapping) else None, "shape", kernel.shape)
  return math.prod(shape[: len(shape) - kernel.ndim])


def _channel_axes(module: nn.Module) -> tuple[int, ...]:
  """The last axis, except for a transposed kernel (features, inputs) and dense layers with several feature axes."""
  if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
    return (-2,)
  if isinstance(module, nn.DenseGeneral) and not isinstance(module.features, int):
    return tuple(range(-len(module.features), 0))
  return (-1,)


def batch_norm_layers(network: Network) -> tuple[str, ...]:
  """Names of the BatchNorm layers in execution order."""
  return tuple(layer.name for layer in layers(network) if layer.is_batch_norm)


def matmul_layers(network: Network) -> tuple[Layer, ...]:
  """Convolutions and dense layers in execution order."""
  return tuple(layer for layer in layers(network) if layer.is_matmul)


def in_order(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
  """`values` in execution order; jit returns dicts sorted by key."""
  order = {name: i for i, name in enumerate(names)}
  # A stacked layer `path[i]` takes the place of its path.
  return dict(sorted(values.items(), key=lambda kv: order.get(kv[0].split("[")[0], len(order))))
