"""The learning rate that waits for a plateau of the loss: against PyTorch's scheduler, over restarts and devices."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.distillation import DistillConfig, distill, distill_with_history
from kwjax.errors import CheckpointError, KwjaxError
from kwjax.network import Network

KEY = jax.random.key(5)
# No patience and a learning rate at which the loss jumps: several cuts within these steps.
CONFIG = DistillConfig(
  14, batch_size=16, learning_rate=1.0, iq_weight=0.0, schedule="plateau", plateau_factor=0.5, plateau_patience=0
).replace(plateau_steps=2, log_every=1, checkpoint_every=3)


def flat(tree: Any) -> np.ndarray:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(("patience", "algorithm"), [(0, "sgd"), (2, "sgd"), (3, "adam")])
def test_plateau_is_torchs_on_means_of_the_loss(patience: int, algorithm: Any) -> None:
  torch = pytest.importorskip("torch")
  each, epochs = 3, 25
  config = DistillConfig(
    each * epochs, learning_rate=0.2, algorithm=algorithm, schedule="plateau", plateau_factor=0.5, momentum=0.0
  ).replace(plateau_patience=patience, plateau_steps=each)
  # Falls, stays within a ten-thousandth, rises, falls again.
  shape = np.concatenate([np.linspace(3, 1, 6), np.full(8, 0.99995), np.linspace(1.2, 0.5, 11)])
  losses = (shape[:, None] + np.array([-0.1, 0.0, 0.1])).astype(np.float32)
  reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
  scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, patience=patience, factor=0.5)
  optimizer = config.optimizer()
  x = jnp.ones(2)
  state = optimizer.init(x)
  update = jax.jit(lambda loss, state: optimizer.update(jnp.ones(2), state, x, value=loss))
  found, expected = [], []
  for epoch in losses:
    for loss in epoch:
      updates, state = update(loss, state)
      found.append(float(config.plateau_scale(state)) * 0.2)
      np.testing.assert_allclose(updates, -found[-1] * np.ones(2), rtol=1e-4)
    reference.step()
    scheduler.step(float(epoch.mean()))
    expected.append(reference.param_groups[0]["lr"])
  # Between two averages nothing changes: a cut comes with the last step of one.
  np.testing.assert_allclose(found[each - 1 :: each], expected, rtol=1e-5)
  np.testing.assert_allclose(np.reshape(found, (epochs, each))[1:, :-1], np.repeat(expected[:-1], 2).reshape(-1, 2))
  assert len(set(expected)) > 1


def test_constant_is_the_peak_after_the_warm_up() -> None:
  rate = DistillConfig(20, learning_rate=0.3, warmup_steps=3, schedule="constant").learning_rate_at()
  np.testing.assert_allclose([rate(t) for t in range(6)], [0.075, 0.15, 0.225, 0.3, 0.3, 0.3], rtol=1e-6)
  assert float(DistillConfig(20, learning_rate=0.3, schedule="constant").learning_rate_at()(19)) == 0.3


def test_settings_hold_whatever_decides_the_result() -> None:
  noise = DistillConfig.preset("noise")
  stored = json.loads(json.dumps(noise.to_json()))
  assert {name: stored[name] for name in ("schedule", "plateau_factor", "plateau_patience", "plateau_steps")} == {
    "schedule": "plateau", "plateau_factor": 0.1, "plateau_patience": 10, "plateau_steps": 196,
  }  # fmt: skip
  # What decides only how often the host looks, and where images lie, may change when a run is resumed.
  assert noise.replace(log_every=7, checkpoint_every=9, resident_bytes=1).to_json() == noise.to_json()


class Killed(Exception):
  pass


def test_killed_in_the_middle_of_an_average_it_ends_with_the_same_bits(
  student: Network, teacher: Network, images: np.ndarray, tmp_path: Any
) -> None:
  def kill(step: int, metrics: dict[str, float], network: Any) -> None:
    if step == 4:  # the state of step 3 is stored: one loss of two is in the average
      raise Killed

  whole, history = distill_with_history(student, teacher, images, CONFIG, key=KEY)
  rates = [row["learning_rate"] for row in history]
  assert rates[0] == 1.0
  assert len({round(rate, 6) for rate in rates}) >= 3, "the loss made the run cut its rate at least twice"
  with pytest.raises(Killed):
    distill(student, teacher, images, CONFIG, key=KEY, workdir=tmp_path, callback=kill)
  resumed, again = distill_with_history(student, teacher, images, CONFIG, key=KEY, workdir=tmp_path)
  np.testing.assert_array_equal(flat(resumed), flat(whole))
  assert again == history
  with pytest.raises(CheckpointError, match=r"config\.plateau_patience"):
    distill(student, teacher, images, CONFIG.replace(plateau_patience=1), key=KEY, workdir=tmp_path)


def test_two_devices_cut_when_one_does(student: Network, teacher: Network, images: np.ndarray) -> None:
  config = CONFIG.replace(batch_size=13, learning_rate=0.05, steps=6)  # one image of padding
  results = [distill_with_history(student, teacher, images, config, key=KEY, devices=n) for n in (1, 2)]
  (one, history), (two, history2) = results
  rates, rates2 = ([row["learning_rate"] for row in rows] for rows in (history, history2))
  np.testing.assert_allclose(rates2, rates, rtol=1e-6)
  moved = np.linalg.norm(flat(one.variables["params"]) - flat(student.variables["params"]))
  assert np.linalg.norm(flat(one.variables["params"]) - flat(two.variables["params"])) <= 1e-3 * moved


def test_the_bar_shows_the_rate(
  student: Network, teacher: Network, images: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
  distill(student, teacher, images, CONFIG.replace(steps=1, learning_rate=0.0625), key=KEY, progress=True)
  assert "lr 0.062" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"schedule": "step"}, "unknown schedule 'step'; known: cosine, constant, plateau"),
    ({"plateau_factor": 1.0}, "plateau_factor must lie between 0 and 1, found 1.0"),
    ({"plateau_patience": -1}, "plateau_patience must not be negative, found -1"),
    ({"plateau_steps": 0}, "plateau_steps must be at least 1, found 0"),
  ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
  with pytest.raises(KwjaxError, match=message):
    DistillConfig(5, **settings)
