"""Pure parts of the benchmark: thresholds, ratios, the settings that are compared, and what a user can get wrong."""

import numpy as np
import pytest

from benchmarks.quality_curves import DEFAULT, PAPER, Point, Run, plot, ratio, reached, scatter, summary, table
from benchmarks.time_to_quality import candidates, main, weight_files
from kwjax.errors import KwjaxError
from kwjax.synthesis import Augmentation, SynthesisConfig


def falling(step_seconds: float, decay: float, steps: int = 12, jitter: float = 0.0) -> list[Point]:
  """J_KL = decay^step; a step takes `step_seconds`, every other one `jitter` more, and 3 CPU seconds a second."""
  seconds = np.cumsum(step_seconds + jitter * (np.arange(steps) % 2))
  return [Point(i + 1, s, 3 * step_seconds * (i + 1), decay ** (i + 1)) for i, s in enumerate(seconds.tolist())]


def run(step_seconds: float, decay: float, **changes: float) -> Run:
  curve = falling(step_seconds, decay, **changes)  # type: ignore[arg-type]
  return Run(curve, [Point(0, 0.0, 0.0, 1.0), *curve[4::5]], 7.0, np.zeros((1, 2, 2, 3)))


def test_the_first_point_at_or_below_the_threshold_counts_even_if_the_curve_rises_again() -> None:
  curve = [Point(i, float(i), 2.0 * i, jkl) for i, jkl in enumerate((0.4, 0.1, 0.02, 0.3, 0.01))]
  assert reached(curve, 0.02) == curve[2]
  assert reached(curve, 0.005) is None


def test_ratio_of_exponentials_in_closed_form() -> None:
  """0.5^t reaches 1/16 after 4 steps, 0.25^t after 2: with steps of 2 s and 1 s that is 8 s against 2 s."""
  paper, ours = falling(2.0, 0.5), falling(1.0, 0.25)
  assert ratio(paper, ours, 1 / 16, "seconds") == (4.0, False)
  assert ratio(paper, ours, 1 / 16, "step") == (2.0, False)
  # Never reached in 12 steps: 24 s are a lower bound.
  assert ratio(paper, ours, 0.25**7, "seconds") == (24.0 / 7.0, True)
  assert ratio(ours, paper, 0.25**7, "seconds") is None


def test_scatter_is_that_of_single_steps() -> None:
  assert scatter(falling(1.0, 0.5)) == pytest.approx(0.0)
  # Between the points lie six steps of 2 s and five of 1 s: quartiles 1 and 2, median 2.
  assert scatter(falling(1.0, 0.5, jitter=1.0)) == pytest.approx(0.5)


def test_a_noisy_clock_hands_over_to_cpu_seconds() -> None:
  calm = summary("net", {PAPER: run(2.0, 0.5), DEFAULT: run(1.0, 0.25)}, 1 / 16)
  noisy = summary("net", {PAPER: run(2.0, 0.5), DEFAULT: run(1.0, 0.25, jitter=1.0)}, 1 / 16)
  assert calm[1]["views"]["ratio"] == 4.0
  assert noisy[1]["views"]["ratio_seconds"] == pytest.approx(8 / 3)
  assert noisy[1]["views"]["ratio"] == noisy[1]["views"]["ratio_cpu_seconds"] == pytest.approx(4.0)
  assert "from CPU seconds" in table(noisy)
  assert "from wall-clock seconds" in table(calm)


def test_rows_tell_both_readings_and_compilation(tmp_path) -> None:
  rows = summary("net", {PAPER: run(2.0, 0.9), DEFAULT: run(1.0, 0.25)}, 1 / 16)
  assert rows[1]["clean"]["reached"]["step"] == 5  # measured after 5 and 10 steps only
  assert rows[1]["views"]["seconds_with_compiling"] == 2.0 + 7.0
  assert rows[0]["views"]["reached"] is None
  assert rows[1]["views"]["ratio_is_bound"]
  text = table(rows)
  assert "not by step 12" in text
  assert ">12.00" in text  # 24 s of the paper's settings against 2 s
  plot(rows, tmp_path / "new" / "curves.png")
  assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
  with pytest.raises(KwjaxError, match="cannot write"):
    plot(rows, tmp_path / "new" / "curves.png" / "under_a_file.png")


def test_candidates_are_the_papers_settings_the_default_and_changes_of_it() -> None:
  found = candidates(32, 64)
  paper = SynthesisConfig.preset("bns", "resnet44_cifar10")
  assert found[PAPER] == paper.replace(batch_size=64)
  assert (paper.duplicates, paper.init, paper.learning_rate) == (4, "randn", 0.1)
  assert found[PAPER].augmentation == Augmentation.paper()
  default = found[DEFAULT]
  assert default == SynthesisConfig.for_network("bns", 32).replace(batch_size=64)
  names = default.__dataclass_fields__
  changed = {
    name: {field for field in names if getattr(config, field) != getattr(default, field)}
    for name, config in found.items()
  }
  assert changed["lr 0.2"] == {"learning_rate"}
  assert changed["flip"] == {"augmentation"}
  assert changed["training+clean"] == {"augmentation", "duplicates"}
  assert [name for name, fields in changed.items() if not fields] == [DEFAULT]


@pytest.mark.parametrize(
  ("pairs", "names", "message"),
  [
    ([], ["resnet20"], "resnet20 needs trained weights: --weights resnet20=FILE"),
    (["resnet20"], ["resnet20"], "takes NAME=FILE"),
    (["=a.th"], ["resnet20"], "takes NAME=FILE"),
    (["resnet18=a.th"], ["resnet18"], "'resnet18'; known: resnet20, resnet44"),
  ],
)
def test_weights_are_asked_for_in_one_sentence(pairs: list[str], names: list[str], message: str) -> None:
  with pytest.raises(KwjaxError, match=message):
    weight_files(pairs, names)


def test_weight_files_may_hold_an_equals_sign() -> None:
  assert weight_files(["resnet20=a=b.th"], ["resnet20"]) == {"resnet20": "a=b.th"}


def test_missing_weights_end_with_status_two(capsys) -> None:
  assert main(["--networks", "resnet20"]) == 2
  assert capsys.readouterr().err == "error: resnet20 needs trained weights: --weights resnet20=FILE\n"
