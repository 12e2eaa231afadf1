"""Units of a network: the parts between two places where everything passes through one array.

The places are found from the data flow of the traced forward pass, so a unit is a residual block, an inverted residual, a
layer of a dense block or a single layer in whatever way the module is written. What comes behind a layer, up to the next
one, belongs to its unit: normalization, activation, pooling.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kwjax import intercept
from kwjax.batchnorm import matches
from kwjax.errors import KwjaxError
from kwjax.network import Array, Network, Variables
from kwjax.reconstruction.trace import GIVEN, MARK, Form, marks_in, trace

MOST_IN_CHAIN = 4
"""Layers of one module that follow one another are one unit up to this number, such as those of an inverted residual."""

Path = tuple[str, ...]
Role = tuple[Any, ...]


class Unit(NamedTuple):
  """A part of a network that is reconstructed at once.

  Attributes:
    name: the module that its layers share, or its only layer.
    layers: convolutions and dense layers in it, in execution order.
  """

  name: str
  layers: tuple[str, ...]


def find_units(network: Network, patterns: Sequence[str] = ()) -> tuple[Unit, ...]:
  """The units of a network in execution order; every convolution and dense layer is in one.

  Args:
    network: any network.
    patterns: paths or regular expressions of layers; neighbouring units whose layers all match one are joined.

  Raises:
    KwjaxError: a pattern matches no layer.
  """
  names = [layer.name for layer in intercept.matmul_layers(network)]
  for pattern in patterns:
    if not any(matches(name, [pattern]) for name in names):
      raise KwjaxError(f"units: no layer of {network.name} matches {pattern!r}; there are {', '.join(names[:8])}")
  groups = _joined(_groups(network), tuple(patterns))
  return tuple(Unit(_common(group), tuple(group)) for group in groups)


def _groups(network: Network) -> list[list[str]]:
  """Layers between two places where one array is alive."""
  program = trace(network, {}, "float", dict(network.variables), 2).jaxpr
  found: dict[int, list[str]] = {}
  for eqn, start in _starts(program):
    found.setdefault(start, []).extend(marks_in(eqn))
  return [list(dict.fromkeys(group)) for group in found.values()]


def _starts(program: Any) -> list[tuple[Any, int]]:
  """Every equation in which a layer begins, with the last place before it where one array is alive."""
  single = [point for point, _ in _bottlenecks(program)]
  found = []
  for position, eqn in enumerate(program.eqns):
    if marks_in(eqn):
      before = [point for point in single if point <= position]
      found.append((eqn, before[-1] if before else 0))
  return found


def _bottlenecks(program: Any) -> list[tuple[int, Any]]:
  """Places `(equation, array)` before which nothing but this array depends on the images and is still needed."""
  image = program.invars[-1]
  count = image.aval.shape[0]
  last: dict[Any, int] = {}
  for position, eqn in enumerate(program.eqns):
    for var in _variables(eqn.invars):
      last[var] = position
  for var in _variables(program.outvars):
    last[var] = len(program.eqns)
  alive, found = {image}, []
  for position, eqn in enumerate(program.eqns):
    alive = {var for var in alive if last.get(var, -1) >= position}
    if len(alive) == 1:
      (only,) = alive
      shape = only.aval.shape
      if shape and shape[0] == count and jnp.issubdtype(only.aval.dtype, jnp.floating):
        found.append((position, only))
    if any(var in alive for var in _variables(eqn.invars)):
      alive |= set(_variables(eqn.outvars))
  return found


def _variables(atoms: Sequence[Any]) -> list[Any]:
  return [atom for atom in atoms if not isinstance(atom, jax.extend.core.Literal)]


def _joined(groups: list[list[str]], patterns: tuple[str, ...]) -> list[list[str]]:
  """Neighbours that belong together: they share a kernel, are a short chain in one module, or match a pattern."""
  sizes: dict[str, int] = {}
  for name in dict.fromkeys(itertools.chain(*groups)):
    sizes[_parent(name)] = sizes.get(_parent(name), 0) + 1

  def tied(left: list[str], right: list[str]) -> bool:
    if any(all(matches(name, [pattern]) for name in (*left, *right)) for pattern in patterns):
      return True
    parents = {_parent(name) for name in (*left, *right)}
    return len(parents) == 1 and parents != {""} and sizes[parents.pop()] <= MOST_IN_CHAIN

  joined: list[list[str]] = []
  for group in groups:
    if joined and tied(joined[-1], group):
      joined[-1] = [*joined[-1], *group]
    else:
      joined.append(list(group))
  # A kernel that is used again is trained once, with everything between its uses.
  for name in dict.fromkeys(itertools.chain(*groups)):
    places = [i for i, group in enumerate(joined) if name in group]
    if places and places[-1] > places[0]:
      joined[places[0] : places[-1] + 1] = [list(itertools.chain(*joined[places[0] : places[-1] + 1]))]
  return [list(dict.fromkeys(group)) for group in joined]


def _parent(name: str) -> str:
  return name.rpartition("/")[0]


def _common(names: Sequence[str]) -> str:
  if len(names) == 1:
    return names[0]
  paths = [name.split("/") for name in names]
  shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths))]
  return "/".join(shared) or f"{names[0]} to {names[-1]}"


@dataclasses.dataclass(frozen=True)
class Part:
  """The program of one unit in one form: `part(leaves, x)`, for any number of images.

  Two parts are equal if their programs are, whatever their layers are called. Functions that take a part as a static argument
  are then compiled once for both.

  Attributes:
    signature: text of the program and of the roles of its variables.
    roles: of the variables that it takes, in this order: ("kernel", i) and ("given", i, field, ...) of the unit's layer i, or
      () for another one.
    paths: of the variables in the network.
    cut: of the network.
    index: of the unit.
  """

  signature: str
  roles: tuple[Role, ...] = dataclasses.field(compare=False)
  paths: tuple[Path, ...] = dataclasses.field(compare=False)
  cut: Cut = dataclasses.field(compare=False)
  index: int = dataclasses.field(compare=False)

  def __call__(self, leaves: Sequence[Array], x: Array) -> Array:
    """Output [b, ...] of the unit for its input [b, ...].

    Args:
      leaves: the variables at `paths`.
      x: of the size that the unit gets in the network.
    """
    program, paths = self.cut.piece(self.index, x.shape[0])
    assert paths == self.paths
    return jax.extend.core.jaxpr_as_fun(program)(*leaves, x)[0]

  @property
  def name(self) -> str:
    """Of its unit."""
    return self.cut.units[self.index].name

  @property
  def channels(self) -> int:
    """Size of the last axis of its output."""
    return self.cut.piece(self.index, self.cut.count)[0].out_avals[0].shape[-1]

  def leaves(self, variables: Variables) -> list[Any]:
    """The variables that it takes."""
    found = {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]}
    return [found[path] for path in self.paths]


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
  """A network cut into its units, in one form.

  Attributes:
    network: the float network.
    units: of `find_units`.
    bits: of the input of each layer whose input is rounded.
    form: of the program.
    variables: shapes of what the program takes.
    count: images for which it is traced first.
  """

  network: Network
  units: tuple[Unit, ...]
  bits: Mapping[str, int]
  form: Form
  variables: Variables
  count: int

  @functools.cached_property
  def parts(self) -> tuple[Part, ...]:
    """The program of every unit.

    Raises:
      KwjaxError: the network cannot be cut there.
    """
    found = []
    for index, unit in enumerate(self.units):
      program, own = self.piece(index, self.count)
      roles = tuple(_role(path, unit.layers) for path in own)
      # Addresses of functions differ from trace to trace.
      text = re.sub(rf"{MARK}[^\]\s]*", "layer", re.sub(r" at 0x[0-9a-f]+", "", str(program)))
      found.append(Part(f"{roles} {text}", roles, own, self, index))
    return tuple(found)

  @functools.cache  # noqa: B019 - a cut lives as long as its run
  def _traced(self, count: int) -> tuple[Any, list[tuple[int, Any]]]:
    closed = trace(self.network, self.bits, self.form, self.variables, count)
    program = closed.jaxpr
    owner = {name: index for index, unit in enumerate(self.units) for name in unit.layers}
    begins: dict[int, int] = {}
    for eqn, start in _starts(program):
      for name in marks_in(eqn):
        begins[owner[name]] = min(begins.get(owner[name], start), start)
    places = dict(_bottlenecks(program))
    cuts = [(0, program.invars[-1])]
    for index in range(1, len(self.units)):
      start = begins.get(index, -1)
      if start not in places or start <= cuts[-1][0]:
        raise KwjaxError(
          f"{self.network.name} cannot be cut in front of {self.units[index].name}: more than one array passes there; join "
          "it with the unit before it by a pattern in units"
        )
      cuts.append((start, places[start]))
    return closed, cuts

  @functools.cache  # noqa: B019
  def piece(self, index: int, count: int) -> tuple[Any, tuple[Path, ...]]:
    """Program of a unit for `count` images, `(*leaves, x) -> (output,)`, and the paths of the leaves."""
    closed, cuts = self._traced(count)
    program = closed.jaxpr
    begin = cuts[index][1]
    end = cuts[index + 1][1] if index + 1 < len(cuts) else program.outvars[0]
    constants = dict(zip(program.constvars, closed.consts, strict=True))
    paths = [_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(self.variables)[0]]
    arguments = dict(zip(program.invars[:-1], paths, strict=True))
    needed, eqns = {end}, []
    for eqn in reversed(program.eqns):
      if any(var in needed for var in eqn.outvars) and begin not in eqn.outvars:
        eqns.append(eqn)
        needed |= set(_variables(eqn.invars))
    used = [var for var in program.invars[:-1] if var in needed]
    held = [var for var in program.constvars if var in needed]
    # In the order of their first use, so that units of one program take them alike.
    order: dict[Any, int] = {}
    for eqn in reversed(eqns):
      for var in _variables(eqn.invars):
        order.setdefault(var, len(order))
    used.sort(key=lambda var: order[var])
    names = jax.extend.core.DebugInfo("unit", self.units[index].name, ("",) * (len(used) + 1), ("",))
    jaxpr = jax.extend.core.Jaxpr(held, [*used, begin], [end], list(reversed(eqns)), debug_info=names)
    return jax.extend.core.ClosedJaxpr(jaxpr, [constants[var] for var in held]), tuple(arguments[var] for var in used)


def _path(path: Any) -> Path:
  return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _role(path: Path, layers: Sequence[str]) -> Role:
  for index, name in enumerate(layers):
    parts = () if name == "<top>" else tuple(name.split("/"))
    rest = path[1 + len(parts) :]
    if path[1 : 1 + len(parts)] != parts:
      continue
    if path[0] == "params" and rest == ("kernel",):
      return ("kernel", index)
    if path[0] == "batch_stats" and rest and rest[0].endswith(f":{GIVEN}"):
      return ("given", index, *rest[1:])
  return ()
