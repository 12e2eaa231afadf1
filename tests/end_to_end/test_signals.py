"""One run a folder, and an orderly end when it is asked for: SIGTERM and Ctrl-C in every stage."""

from __future__ import annotations

import pathlib
import random
import signal
import time

import pytest

from tests.end_to_end import jobs
from tests.end_to_end.conftest import Undisturbed

TERM, INT = signal.SIGTERM, signal.SIGINT
STEPS = 1_000_000
"""So many that the stage is sure to be under way when the signal comes."""


def stop_in(stage: str, number: signal.Signals, undisturbed: Undisturbed, workdir: pathlib.Path, delay: float) -> None:
  """Runs the job until it is in a stage, signals it, and checks how it ends."""
  process = jobs.Process(undisturbed.inputs, workdir, workdir.with_suffix(f".{stage}"))
  process.wait_for(stage)
  time.sleep(delay)
  status, said = process.signal(number), process.said()
  if process.stage() == "end":
    return  # a machine so fast that the signal came too late
  assert status == 128 + number, said
  assert "Traceback" not in said
  assert "stopping at the next safe point" in said
  assert "the same command goes on from" in said.splitlines()[-1]


@pytest.mark.slow
def test_stopped_in_every_stage_it_ends_with_the_same_bits(undisturbed: Undisturbed, tmp_path: pathlib.Path) -> None:
  moments = random.Random(0)
  for stage, number in {"synthesis": TERM, "calibration": INT, "distillation": TERM}.items():
    stop_in(stage, number, undisturbed, tmp_path / "run", moments.uniform(0.0, 0.2))
  last = jobs.Process(undisturbed.inputs, tmp_path / "run", tmp_path / "log")
  assert last.wait() == 0, last.said()
  jobs.assert_same_result(tmp_path / "run", undisturbed.result)


@pytest.mark.slow
def test_the_state_is_saved_before_the_end(undisturbed: Undisturbed, tmp_path: pathlib.Path) -> None:
  """With the next checkpoint hours away, what is there after the signal was saved because of it."""
  for stage, folder in (("synthesis", "synthesis/checkpoints"), ("distillation", "distillation/checkpoints")):
    workdir = tmp_path / stage
    sizes = {"checkpoint_seconds": 1e6, "checkpoint_steps": STEPS}
    sizes |= {"steps": STEPS} if stage == "synthesis" else {"steps": 3, "distill_steps": STEPS}
    process = jobs.Process(undisturbed.inputs, workdir, tmp_path / f"{stage}.log", **sizes)
    process.wait_for(stage)
    time.sleep(1.0)
    assert not list(workdir.glob(f"{folder}/**/metadata/metadata"))
    assert process.signal(TERM) == 143, process.said()
    assert len(list(workdir.glob(f"{folder}/**/metadata/metadata"))) == 1


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_second_interrupt_ends_the_first_at_once(
  undisturbed: Undisturbed, tmp_path: pathlib.Path
) -> None:
  workdir = tmp_path / "run"
  first = jobs.Process(undisturbed.inputs, workdir, tmp_path / "first", steps=STEPS)
  first.wait_for("synthesis")
  second = jobs.Process(undisturbed.inputs, workdir, tmp_path / "second", steps=STEPS)
  assert second.wait() == 2
  assert "everything goes to" not in second.said()
  assert f"error: {workdir} is in use by process {first.pid} on " in second.said().splitlines()[-1]
  assert first.runs()
  # The second signal comes as soon as the first was answered.
  first.send(INT)
  deadline = time.monotonic() + jobs.LIMIT_SECONDS
  while "stopping at the next safe point" not in first.said() and first.runs():
    assert time.monotonic() < deadline
    time.sleep(0.001)
  status = first.signal(INT)
  # Either it ended at once, or it had reached its safe point between the two.
  assert status in (-INT, 130), first.said()
  third = jobs.Process(undisturbed.inputs, workdir, tmp_path / "third", steps=STEPS)
  third.wait_for("synthesis")
  assert third.signal(TERM) == 143, third.said()
