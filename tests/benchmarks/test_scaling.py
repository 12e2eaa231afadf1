"""What the scaling benchmark counts, and what it refuses."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks import scaling
from benchmarks.scaling import Collectives, collectives

HLO = """
  %all-reduce = (f32[16]{0}, f32[4,8]{1,0}) all-reduce(%a, %b), channel_id=1
  %start = f32[2,3]{1,0} all-gather-start(%c), dimensions={0}
  %done = f32[2,3]{1,0} all-gather-done(%start)
  %scalar = s32[] all-reduce(%d), channel_id=3
  %fusion = f32[99]{0} fusion(%all-reduce), kind=kLoop
"""


def test_collectives_are_counted_with_the_bytes_of_their_results() -> None:
  assert collectives(HLO) == Collectives(3, 4 * (16 + 32 + 6 + 1))


@pytest.mark.parametrize(("batch", "devices"), [("6", ["1", "4"]), ("0", ["1"]), ("4", ["0"])])
def test_shares_that_are_not_equal_are_refused_before_any_work(
  capsys: pytest.CaptureFixture[str], batch: str, devices: list[str]
) -> None:
  assert scaling.main(["--batch", batch, "--devices", *devices]) == 2
  assert f"error: --batch {batch} does not divide over {devices[-1]} devices" in capsys.readouterr().err


@pytest.mark.slow
def test_two_devices_exchange_what_one_does_not(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("XLA_FLAGS", "")  # which the command adds to
  file = tmp_path / "scaling.json"
  options = ["--network", "resnet20", "--batch", "2", "--devices", "1", "2", "--repeats", "1", "--json", str(file)]
  assert scaling.main(options) == 0
  one, two = json.loads(file.read_text())["results"]
  assert (one["devices"], one["bytes"]) == (1, 0)
  assert (two["devices"], two["collectives"] > 0, two["bytes"] > 0) == (2, True, True)
