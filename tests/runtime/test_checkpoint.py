"""Checkpoints: round trip of every kind of leaf, a kill in the middle, each way a file can be damaged."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.errors import CheckpointError
from kwjax.runtime.checkpoint import Checkpoints

SETTINGS = {"scheme": "bns", "lr": 0.1, "shape": (2, 3)}


class State(NamedTuple):
  images: jax.Array
  moments: dict[str, jax.Array]
  key: jax.Array
  step: jax.Array


def _state(seed: int = 0, size: int = 1000) -> State:
  rng = np.random.default_rng(seed)
  return State(
    jnp.asarray(rng.normal(size=(size, 3)), jnp.float32),
    {"half": jnp.asarray(rng.normal(size=(4, 5)), jnp.bfloat16), "none": jnp.zeros((0, 3)), "flag": jnp.array([True])},
    jax.random.split(jax.random.key(seed), 2),
    jnp.int32(seed),
  )


def _assert_same(found: Any, expected: Any) -> None:
  assert jax.tree_util.tree_structure(found) == jax.tree_util.tree_structure(expected)
  for a, b in zip(jax.tree_util.tree_leaves(found), jax.tree_util.tree_leaves(expected)):
    assert a.dtype == b.dtype
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert a.shape == b.shape


def _damage(folder: pathlib.Path, how: str) -> None:
  """Damages the largest data file of one step (or its metadata) in the given way."""
  if how.startswith("metadata"):
    path = folder / "metadata" / "metadata"
  else:
    path = max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  if how.endswith("flip"):
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
  elif how.endswith("truncate"):
    path.write_bytes(data[: len(data) // 2])
  else:
    path.unlink()


def test_every_kind_of_leaf_survives(tmp_path: pathlib.Path) -> None:
  state = _state(3)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(state, settings=SETTINGS) is None
    assert checkpoints.save(7, state, settings=SETTINGS, extra={"batch": 2, "curve": np.float32([0.5, 0.25])})
  with Checkpoints(tmp_path) as checkpoints:
    for template in (_state(9), jax.eval_shape(lambda: _state(9))):
      found = checkpoints.restore(template, settings={**SETTINGS, "shape": [2, 3]})
      assert found is not None
      assert (found.step, found.extra) == (7, {"batch": 2, "curve": [0.5, 0.25]})
      _assert_same(found.state, state)
  # A restored key must go on with the same random numbers.
  np.testing.assert_array_equal(jax.random.normal(found.state.key[0]), jax.random.normal(state.key[0]))


def test_numpy_arrays_python_numbers_and_other_key_kinds_keep_their_kind(tmp_path: pathlib.Path) -> None:
  state = {"a": np.arange(3, dtype=np.float64), "n": 4, "x": 0.1, "rbg": jax.random.key(1, impl="rbg")}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, settings={})
    found = checkpoints.restore(state, settings={})
    assert found is not None
    assert isinstance(found.state["a"], np.ndarray)
    assert found.state["a"].dtype == np.float64
    assert (found.state["n"], found.state["x"], type(found.state["n"])) == (4, 0.1, int)
    assert found.state["rbg"].dtype == state["rbg"].dtype
    with pytest.raises(CheckpointError, match=r"\['rbg'\].*expected random key threefry2x32 .*found random key rbg"):
      checkpoints.restore({**state, "rbg": jax.random.key(1)}, settings={})


def test_an_empty_state_is_a_state(tmp_path: pathlib.Path) -> None:
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, (), settings={}, extra={"a": 1})
    found = checkpoints.restore((), settings={})
  assert found == (0, (), {"a": 1})


def test_only_the_last_steps_stay_and_steps_only_grow(tmp_path: pathlib.Path) -> None:
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 5, 9):
      assert checkpoints.save(step, _state(step), settings=SETTINGS)
    assert checkpoints.steps() == [5, 9]
    assert checkpoints.save(9, _state(9), settings=SETTINGS) is False
    with pytest.raises(CheckpointError, match=r"cannot save step 6 .* step 9 is stored"):
      checkpoints.save(6, _state(6), settings=SETTINGS)
  with pytest.raises(CheckpointError, match="keep must be at least 1, got 0"):
    Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "metadata-flip", "metadata-truncate", "metadata-delete"])
def test_a_damaged_step_is_named_and_the_one_before_is_used(tmp_path: pathlib.Path, how: str) -> None:
  with Checkpoints(tmp_path) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, _state(step), settings=SETTINGS, extra={"curve": list(range(100))})
  _damage(tmp_path / "20", how)
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.warns(UserWarning, match=r"checkpoint .*20 is damaged \(.*\).*step 10 is used"):
      found = checkpoints.restore(_state(), settings=SETTINGS)
    assert found is not None
    assert found.step == 10
    _assert_same(found.state, _state(10))
    # The run goes on and meets the same step again.
    assert (tmp_path / "damaged-20").is_dir()
    assert checkpoints.save(20, _state(20), settings=SETTINGS)
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      again = checkpoints.restore(_state(), settings=SETTINGS)
    assert again is not None
    _assert_same(again.state, _state(20))


def test_a_flipped_byte_anywhere_never_restores_another_state(tmp_path: pathlib.Path) -> None:
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _state(1, size=20), settings=SETTINGS)
  data_files = [p for p in (tmp_path / "1").rglob("*") if p.is_file()]
  assert len(data_files) > 3
  refused = 0
  for path in data_files:
    data = path.read_bytes()
    for position in np.linspace(0, len(data) - 1, 6).astype(int) if data else ():
      path.write_bytes(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :])
      with Checkpoints(tmp_path) as checkpoints:
        try:
          found = checkpoints.restore(_state(), settings=SETTINGS)
        except CheckpointError:
          refused += 1
        else:
          assert found is not None
          _assert_same(found.state, _state(1, size=20))
    path.write_bytes(data)
  assert refused > 5


def test_all_steps_damaged_is_an_error_and_removes_nothing(tmp_path: pathlib.Path) -> None:
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, _state(step), settings=SETTINGS)
  for step in (1, 2):
    _damage(tmp_path / str(step), "flip")
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(step 2: .*; step 1: "):
      checkpoints.restore(_state(), settings=SETTINGS)
    assert checkpoints.steps() == [1, 2]


def test_other_settings_and_other_templates_are_refused_with_names(tmp_path: pathlib.Path) -> None:
  state = _state()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, settings=SETTINGS)
    with pytest.raises(CheckpointError, match=r"lr is 0\.1 there and 0\.2 now; scheme is \"bns\" there and absent"):
      checkpoints.restore(state, settings={"lr": 0.2, "shape": [2, 3]})
    with pytest.raises(CheckpointError, match=r"leaf \.images: expected float32\[4, 3\], found float32\[1000, 3\]"):
      checkpoints.restore(state._replace(images=jnp.zeros((4, 3))), settings=SETTINGS)
    with pytest.raises(CheckpointError, match=r"leaf \.step: expected float32\[\], found int32\[\]"):
      checkpoints.restore(state._replace(step=jnp.float32(0)), settings=SETTINGS)
    with pytest.raises(CheckpointError, match=r"lacks \[.*'new'.*has unknown \[.*'flag'"):
      checkpoints.restore(state._replace(moments={"new": state.images}), settings=SETTINGS)
    # None of these is damage: the step must still be there.
    assert checkpoints.restore(state, settings=SETTINGS) is not None


_KILLED = """
import os, signal, sys, threading
import numpy as np
from kwjax.runtime.checkpoint import Checkpoints
import orbax.checkpoint as ocp

state = lambda step: {"x": np.full((300, 1000), step, np.float32)}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, state(1), settings={})
# Dies after the data of step 2 is written and before it is made final.
import pathlib
real = os.rename
def die(*arguments, **options):
  os.kill(os.getpid(), signal.SIGKILL)
os.rename = os.replace = pathlib.Path.rename = pathlib.Path.replace = die
checkpoints.save(2, state(2), settings={})
"""


def test_a_kill_while_saving_leaves_the_step_before(tmp_path: pathlib.Path) -> None:
  died = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], capture_output=True, check=False)
  assert died.returncode == -9, died.stderr.decode()[-2000:]
  assert any("tmp" in entry.name for entry in tmp_path.iterdir())
  with Checkpoints(tmp_path) as checkpoints:
    found = checkpoints.restore({"x": np.zeros((300, 1000), np.float32)}, settings={})
    assert found is not None
    assert found.step == 1
    assert (found.state["x"] == 1).all()
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]


_FULL = """
import resource, signal, sys
import numpy as np
from kwjax.errors import CheckpointError
from kwjax.runtime.checkpoint import Checkpoints

with Checkpoints(sys.argv[1]) as checkpoints:
  checkpoints.save(1, {"x": np.zeros(50, np.float32)}, settings={})
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (30000, hard))
  try:
    checkpoints.save(2, {"x": np.random.default_rng(0).normal(size=50000)}, settings={})
  except CheckpointError as error:
    print(error)
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  found = checkpoints.restore({"x": np.zeros(50, np.float32)}, settings={})
  print("restored", found.step)
  print("saved", checkpoints.save(3, {"x": np.ones(50, np.float32)}, settings={}), checkpoints.steps())
"""


def test_a_save_that_does_not_fit_is_an_error_and_loses_nothing(tmp_path: pathlib.Path) -> None:
  found = subprocess.run([sys.executable, "-c", _FULL, str(tmp_path)], capture_output=True, text=True, check=False)
  assert "cannot save step 2" in found.stdout, found.stderr[-2000:]
  assert "restored 1" in found.stdout
  assert "saved True [1, 3]" in found.stdout
