"""What tests of sources share: a teacher and a student that differs from it, and a run that is killed."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kwjax.network import Network
from kwjax.runtime.checkpoint import Checkpoints
from kwjax.sources import RunState
from tests.networks import tiny_network


@functools.cache
def pair() -> tuple[Network, Network]:
  """Student and teacher."""
  teacher = tiny_network()
  return teacher.replace(variables=jax.tree.map(lambda v: 0.9 * v, teacher.variables)), teacher


def flat(tree: Any) -> np.ndarray:
  """All numbers of a pytree."""
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


class Killed(Exception):
  """Raised where a test ends a run."""


def kill_at(done: int) -> Callable[..., None]:
  """A callback that ends the run after some steps."""

  def callback(step: int, metrics: dict[str, float], student: Any) -> None:
    if step >= done:
      raise Killed

  return callback


def newest_state(workdir: pathlib.Path, template: RunState) -> RunState:
  """The newest state that a distillation has stored."""
  with Checkpoints(workdir / "distillation" / "checkpoints") as checkpoints:
    metadata = checkpoints._metadata(checkpoints.steps()[-1])
    found = checkpoints.restore(template, settings=metadata["settings"])
  assert found is not None
  return found.state
