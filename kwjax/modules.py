"""Makes any Flax module usable: evaluation mode, a hash, and logits among several outputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.core
import flax.linen as nn
import jax

from kwjax.errors import KwjaxError

OutputPath = tuple[str | int, ...]
"""Keys and indices from a module's output to its logits; empty if the output is the logits."""

# Common names of a module's mode argument, with the value for evaluation.
_EVALUATION_ARGUMENTS = {
  "train": False,
  "training": False,
  "is_training": False,
  "deterministic": True,
  "use_running_average": True,
}


def evaluation_arguments(module: nn.Module) -> dict[str, bool]:
  """Keyword arguments that select evaluation mode, from the signature of `__call__` (`train=False`, ...)."""
  parameters = inspect.signature(type(module).__call__).parameters
  return {name: value for name, value in _EVALUATION_ARGUMENTS.items() if name in parameters}


def hashable_module(module: nn.Module) -> nn.Module:
  """The same module with lists as tuples and dicts frozen, in its attributes and its submodules'.

  jit looks up compiled functions by the module's hash, and `nn.Sequential([...])` has none.

  Raises:
    KwjaxError: an attribute, such as an array, has no hash.
  """
  if _is_hashable(module):
    return module
  frozen = {}
  for field in dataclasses.fields(module):
    if field.init and field.name not in ("parent", "name"):
      frozen[field.name] = _frozen(getattr(module, field.name))
      if not _is_hashable(frozen[field.name]):
        raise KwjaxError(
          f"attribute {field.name} of module {type(module).__name__} is a {type(frozen[field.name]).__name__}, which cannot "
          "be hashed: give it as a number, a text or a tuple of them"
        )
  return module.clone(**frozen)


def _frozen(value: Any) -> Any:
  if isinstance(value, nn.Module):
    return hashable_module(value)
  if isinstance(value, (list, tuple)):
    items = [_frozen(item) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
  if isinstance(value, Mapping):
    return flax.core.FrozenDict({key: _frozen(item) for key, item in value.items()})
  return value


def _is_hashable(value: Any) -> bool:
  try:
    hash(value)
  except TypeError:
    return False
  return True


def output_path(output: str | int | Sequence[str | int] | None) -> OutputPath | None:
  """`output` of a `Network` in normal form: None, or a tuple of keys and indices.

  Raises:
    KwjaxError: it holds something else.
  """
  if output is None:
    return None
  path = tuple(output) if isinstance(output, (list, tuple)) else (output,)
  if not path or not all(isinstance(key, (str, int)) for key in path):
    raise KwjaxError(f"output must be a key, an index, or a sequence of them, found {output!r}")
  return path


def select_logits(returned: Any, path: OutputPath | None, name: str) -> jax.Array:
  """Logits f32[b,k] from what the module of network `name` returned.

  Raises:
    KwjaxError: there is no such output, or it is not logits. The message lists the outputs.
  """
  logits = returned
  for key in path or ():
    try:
      logits = logits[key]
    except (KeyError, IndexError, TypeError) as error:
      raise KwjaxError(f"network {name} has no output {key!r}: its module returned {_described(logits)}") from error
  if isinstance(logits, jax.Array) and logits.ndim == 2:
    return logits
  keys = (
    [*logits] if isinstance(logits, Mapping) else [*range(len(logits))] if isinstance(logits, (list, tuple)) else []
  )
  hint = ""
  if keys:
    example = (*path, keys[0]) if path else keys[0]
    hint = f"; say which output the logits are, such as Network(..., output={example!r})"
  raise KwjaxError(
    f"network {name} must return logits of shape (batch, classes), it returned {_described(logits)}{hint}"
  )


def _described(returned: Any) -> str:
  if isinstance(returned, jax.Array):
    return f"shape {returned.shape}"
  if isinstance(returned, Mapping):
    return f"a {type(returned).__name__} with the keys {', '.join(map(repr, returned))}"
  if isinstance(returned, (list, tuple)):
    return f"a {type(returned).__name__} of {len(returned)} outputs"
  return f"a {type(returned).__name__}"


def leaves_behind(function: Callable[..., Any], variables: Any, *args: Any) -> set[tuple[str, ...]]:
  """Paths of the variables that `function(variables, *args)` depends on; all inputs of a lifted transform count.

  Args:
    function: anything that JAX can trace.
    variables: nested dicts of arrays, or of their shapes.
    args: the other arguments, arrays or their shapes.
  """
  program = jax.make_jaxpr(function)(variables, *args).jaxpr
  # By identity: an equation's inputs can be literals, which have no hash.
  needed = {id(variable) for variable in program.outvars}
  for equation in reversed(program.eqns):
    if any(id(variable) in needed for variable in equation.outvars):
      needed |= {id(variable) for variable in equation.invars}
  paths = [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]]
  return {path for path, variable in zip(paths, program.invars, strict=False) if id(variable) in needed}
