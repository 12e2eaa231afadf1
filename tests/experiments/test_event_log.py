"""What a synthesis hands to TensorBoard: the curves of its history, while it runs and afterwards."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from kwjax.compression.event_log import log_distillation, log_samples, synthesis_callback
from kwjax.distillation import DistillConfig
from kwjax.runtime.reporting.tensorboard import open_log, read_events
from kwjax.synthesis import SampleSet, SynthesisConfig

pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")


def test_batches_follow_each_other_on_one_axis_of_steps(tmp_path: pathlib.Path) -> None:
  config = SynthesisConfig.for_network("bns", 8).with_steps(3)
  loss = np.float32([[3.0, 2.0, 1.0], [6.0, 5.0, 4.0]])
  with open_log(tmp_path / "live") as log:
    callback = synthesis_callback(log, "synthesis", config)
    assert callback is not None
    for batch, done in ((0, 2), (0, 3), (1, 1), (1, 3)):
      callback(batch, {"loss": loss[batch, :done].tolist()})
  live = read_events(tmp_path / "live")
  assert live["synthesis/loss"] == {1: 3.0, 2: 2.0, 3: 1.0, 4: 6.0, 5: 5.0, 6: 4.0}
  rate = config.learning_rate_at()
  expected = {batch * 3 + i + 1: pytest.approx(float(rate(i))) for batch in (0, 1) for i in range(3)}
  assert live["synthesis/learning_rate"] == expected
  assert float(rate(0)) != float(rate(2))

  history = {"loss": loss, "seconds": np.float32([1.0, 2.0])}
  samples = SampleSet(np.zeros((4, 8, 8, 3), np.float32), np.zeros(4, np.int32), history)
  with open_log(tmp_path / "after") as log:
    log_samples(log, "synthesis", config, samples)
  assert read_events(tmp_path / "after") == live
  assert synthesis_callback(None, "synthesis", config) is None


def test_a_fine_tuning_is_logged_with_the_learning_rate_of_its_steps(tmp_path: pathlib.Path) -> None:
  config = DistillConfig.preset("short", steps=20, warmup_steps=0)
  rows = [{"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.25}]
  with open_log(tmp_path) as log:
    log_distillation(log, config, rows[:1])
    log_distillation(log, config, rows)
  log_distillation(None, config, rows)
  found = read_events(tmp_path)
  assert found["distillation/loss"] == {10: 0.5, 20: 0.25}
  rate = config.learning_rate_at()
  assert found["distillation/learning_rate"] == {step: pytest.approx(float(rate(step - 1))) for step in (10, 20)}
