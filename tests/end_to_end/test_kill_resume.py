"""SIGKILL at random moments of every stage: the run that goes on ends with the same bits as one that nothing happened to."""

from __future__ import annotations

import collections
import pathlib
import random
import signal
import time

import pytest

from tests.end_to_end import jobs
from tests.end_to_end.conftest import Undisturbed

KILLS = 10
# A chain is one working folder: a job is killed in the first of these stages, its successor in the second, and so on;
# the last one is left alone.
CHAINS = (
  ("start", "synthesis", "calibration", "distillation", "report"),
  ("synthesis", "synthesis", "calibration", "distillation"),
  ("synthesis", "distillation", "distillation"),
)
# Seconds over which the moment of a kill is spread, about as long as the stages last. On a slower machine kills come
# earlier in a stage, on a faster one some hit the next stage: the test counts where they did hit.
SPREAD = {"start": 0.5, "synthesis": 1.2, "calibration": 0.4, "distillation": 1.0, "report": 0.3}


def run_chain(
  chain: tuple[str, ...], undisturbed: Undisturbed, workdir: pathlib.Path, moments: random.Random
) -> list[str]:
  """Carries a chain out; the stages in which a kill hit."""
  hits = []
  for number, stage in enumerate(chain):
    process = jobs.Process(undisturbed.inputs, workdir, workdir.with_suffix(f".log{number}"))
    process.wait_for(stage)
    time.sleep(moments.uniform(0.0, SPREAD[stage]))
    if process.signal(signal.SIGKILL) == -signal.SIGKILL:
      hits.append(process.stage())
  last = jobs.Process(undisturbed.inputs, workdir, workdir.with_suffix(".log"))
  assert last.wait() == 0, last.said()
  jobs.assert_same_result(workdir, undisturbed.result)
  return hits


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(undisturbed: Undisturbed, tmp_path: pathlib.Path) -> None:
  moments = random.Random(0)
  hits: collections.Counter[str] = collections.Counter()
  # A machine may be so fast that a kill comes after the end; then one of the chains is carried out once more.
  for number in range(3 * len(CHAINS)):
    chain = CHAINS[number % len(CHAINS)]
    hits.update(run_chain(chain, undisturbed, tmp_path / f"run{number}", moments))
    done = number + 1 >= len(CHAINS) and hits.total() >= KILLS
    if done and min(hits[stage] for stage in ("synthesis", "calibration", "distillation")) >= 2:
      break
  assert hits.total() >= KILLS, hits
  assert min(hits[stage] for stage in ("synthesis", "calibration", "distillation")) >= 2, hits
  print(f"{hits.total()} kills: {dict(hits)}; {number + 1} runs compared")
