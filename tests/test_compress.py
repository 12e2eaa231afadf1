"""`kwjax.compress`: the recommended result in three lines, resumed bit for bit, with decisions that its scores bear out."""

from __future__ import annotations

import pathlib
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import kwjax
from kwjax.analysis.scoring import closest
from kwjax.compression import candidates, recipe, settings
from kwjax.compression.workspace import Workspace
from kwjax.errors import CheckpointError, Interrupted, KwjaxError
from kwjax.quantization.methods import METHODS
from kwjax.runtime.devices.parallel import device_group
from kwjax.runtime.result_store import ResultStore
from tests.end_to_end.jobs import tiny_network
from tests.networks import tiny_network as network_without_batch_norm

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).random((12, 8, 8, 3), np.float32)
LABELS = np.arange(12) % 10


@pytest.fixture(scope="module", autouse=True)
def _small() -> Any:
  """What suits small images, smaller still."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(settings._PRESETS, ("cpu", True), settings.Sizes(8, 4, 3, 6, 1, 4, 4, 200, 256, 4, 4))
    yield


@pytest.fixture(scope="module")
def network() -> kwjax.Network:
  return tiny_network()


@pytest.fixture(scope="module")
def result(network: kwjax.Network) -> kwjax.Compressed:
  """Two precisions, with labelled images and a baseline."""
  return kwjax.compress(
    network, ("2w4a", "4w4a"), key=KEY, eval_data=(IMAGES, LABELS), baselines={"noise": IMAGES}, progress=False
  )


def contents(found: kwjax.Compressed) -> list[Any]:
  """Images, weights and scores, bit by bit."""
  leaves = [np.asarray(leaf).tobytes() for student in found.students.values() for leaf in jax.tree.leaves(student)]
  return [found.images.images.tobytes(), leaves, found.scores, found.calibrated, found.fine_tuned, found.decisions]


def test_three_lines(tmp_path: pathlib.Path, network: kwjax.Network, monkeypatch: pytest.MonkeyPatch) -> None:
  kwjax.save_network(network, tmp_path / "float")
  monkeypatch.chdir(tmp_path)

  network = kwjax.load_network("float")
  found = kwjax.compress(network, bits=("4w4a",), key=jax.random.key(0))
  kwjax.save_quantized(found.students["4w4a"], "quantized")

  assert {path.name for path in tmp_path.iterdir()} == {"float", "quantized"}  # nothing else is written
  held_out = found.images.images[found.used :]
  assert (found.used, len(held_out)) == (8, 4)
  loaded = kwjax.load_quantized("quantized")
  assert kwjax.agreement(loaded, network, held_out).kl == pytest.approx(found.scores["4w4a"].held_out.kl, rel=1e-4)  # type: ignore[union-attr]
  assert "4w4a: agrees with float on" in found.summary()


def test_scores_are_those_of_the_students(network: kwjax.Network, result: kwjax.Compressed) -> None:
  assert list(result.students) == list(result.scores) == ["2w4a", "4w4a"]
  assert set(result.calibrated["4w4a"]) == {"bns", "noise"}
  for bits, student in result.students.items():
    score = result.scores[bits]
    assert score.accuracy == kwjax.evaluate(student, IMAGES, LABELS)
    assert score.eval is not None
    assert score.eval.kl == pytest.approx(kwjax.agreement(student, network, IMAGES).kl, rel=1e-4)
  assert result.float_score.accuracy == kwjax.evaluate(network, IMAGES, LABELS)


def test_decisions_agree_with_the_scores(network: kwjax.Network, result: kwjax.Compressed) -> None:
  decided = {decision.about: decision for decision in result.decisions}
  for bits in ("2w4a", "4w4a"):
    assert "least squared error" in decided[f"weight ranges of {bits}"].choice
    assert "least squared error" in decided[f"activations of {bits}"].reason
    rules = result.students[bits].rules
    assert (rules.weights_range, rules.ranges) == ("mse", "mse")
    tried = decided[f"correction of {bits}"].numbers
    assert set(tried) == {"kl_none", "kl_means", "kl_moments"}
    held_out = result.calibrated[bits]["bns"].held_out
    assert held_out is not None
    taken = {"not": "none", "means": "means", "means and": "moments"}
    choice = decided[f"correction of {bits}"].choice
    kind = next(kind for words, kind in reversed(taken.items()) if words in choice)
    assert tried[f"kl_{kind}"] == pytest.approx(held_out.kl)
    tried = decided[f"reconstruction of {bits}"].numbers
    assert tried["kl_calibrated"] == pytest.approx(held_out.kl)
    after = result.reconstructed.get(bits, result.calibrated[bits]["bns"]).held_out
    assert after is not None
    name = "calibrated" if "calibrated" in (choice := decided[f"reconstruction of {bits}"].choice) else "reconstructed"
    name = "moments" if "variances" in choice else "means" if "means" in choice else name
    assert tried[f"kl_{name}"] == pytest.approx(after.kl)
    assert (bits in result.reconstructed) == (name != "calibrated")
  assert all(str(decision).startswith(f"{about}: ") for about, decision in decided.items())


def test_a_later_candidate_has_to_gain_more_than_a_standard_error() -> None:
  plain = [1.0, 2.0, 3.0, 4.0]
  # Mean gains of 0.1 with standard errors of 0, 0.071 and 0.178.
  assert closest({"plain": plain, "other": [0.9, 1.9, 2.9, 3.9]}) == "other"
  assert closest({"plain": plain, "other": [0.9, 1.7, 3.0, 4.0]}) == "other"
  assert closest({"plain": plain, "other": [0.5, 1.7, 3.2, 4.2]}) == "plain"
  assert closest({"plain": plain, "near": [0.9, 1.9, 2.9, 3.9], "nearer": [0.8, 1.8, 2.8, 3.8]}) == "nearer"
  assert closest({"plain": [1.0], "other": [0.9]}) == "other"


@pytest.mark.parametrize(
  ("means", "taken"), [([1.0, 1.1, 1.2, 1.3], "means"), ([2.0, 1.1, 3.0, 1.6], "moments"), (None, "moments")]
)
def test_fewer_corrections_have_to_gain_more_than_chance(
  network: kwjax.Network, means: list[float] | None, taken: str
) -> None:
  # In the order in which they are tried: none, means, moments.
  answers = iter([None if means is None else [9.0] * 4, means, None if means is None else [2.0, 1.4, 2.9, 1.5]])
  scorer = types.SimpleNamespace(divergences=lambda _: next(answers))
  workspace = Workspace(network, device_group(1), ResultStore(None, {}), progress=False)
  rules = kwjax.QuantRules.parse("4w4a", weights="integer")
  method = METHODS["best"]._replace(steps=2, batch_size=16)
  found = candidates.best(workspace, scorer, "4w4a", rules, method, IMAGES, key=KEY, name="bns")  # type: ignore[arg-type]
  assert next(iter(found.tried)) == taken
  expected = kwjax.correct_bias(found.plain, IMAGES, variance=taken == "moments", devices=1)
  jax.tree.map(np.testing.assert_array_equal, found.student, expected)


def test_a_fine_tuned_student_is_kept_only_where_it_is_closer(network: kwjax.Network) -> None:
  config = kwjax.DistillConfig.preset("short", steps=4, batch_size=4)
  result = kwjax.compress(network, ("4w4a",), key=KEY, reconstruct=False, finetune=config, progress=False)
  decided = {decision.about: decision for decision in result.decisions}
  calibrated, tuned = result.calibrated["4w4a"]["bns"], result.fine_tuned
  assert calibrated.held_out is not None
  assert tuned is not None
  assert tuned.held_out is not None
  kept = decided["student of 4w4a"]
  assert kept.numbers == {"kl_calibrated": calibrated.held_out.kl, "kl_fine_tuned": tuned.held_out.kl}
  closer = tuned.held_out.kl < calibrated.held_out.kl
  assert result.keeps_fine_tuned == closer
  assert kept.choice == f"The {'fine-tuned' if closer else 'calibrated'} student is kept."
  # A calibration leaves the kernels as they are.
  kernel = lambda of: np.asarray(of.variables["params"]["conv1"]["kernel"])
  assert np.array_equal(kernel(result.students["4w4a"]), kernel(network)) != closer
  assert result.scores["4w4a"] == (tuned if closer else calibrated)


def stopping_at(calls: int) -> Callable[[], bool]:
  """Asks to stop at a call, and from then on."""
  seen = iter(range(1, 1 << 30))
  return lambda: next(seen) >= calls


def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(
  tmp_path: pathlib.Path, network: kwjax.Network, result: kwjax.Compressed
) -> None:
  given: dict[str, Any] = {"key": KEY, "eval_data": (IMAGES, LABELS), "baselines": {"noise": IMAGES}, "progress": False}
  stops = 0
  for calls in (2, 6, 14, 30, 60):
    try:
      kwjax.compress(network, ("2w4a", "4w4a"), workdir=tmp_path, should_stop=stopping_at(calls), **given)
    except Interrupted:
      stops += 1
  assert stops >= 3
  resumed = kwjax.compress(network, ("2w4a", "4w4a"), workdir=tmp_path, **given)
  assert contents(resumed) == contents(result)
  finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()}
  again = kwjax.compress(network, ("2w4a", "4w4a"), workdir=tmp_path, **given)
  assert contents(again) == contents(result)
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()} == finished
  with pytest.raises(CheckpointError, match="key"):
    kwjax.compress(network, ("2w4a", "4w4a"), workdir=tmp_path, **{**given, "key": jax.random.key(1)})


def test_synthetic_images_calibrate_with_views_and_given_ones_without(
  network: kwjax.Network, monkeypatch: pytest.MonkeyPatch
) -> None:
  seen: list[np.ndarray] = []

  def corrected(workspace: Any, made: Any, images: np.ndarray, correction: Any) -> Any:
    seen.append(images)
    return made

  monkeypatch.setattr("kwjax.compression.student.corrected", corrected)
  options: dict[str, Any] = {"key": KEY, "reconstruct": False, "finetune": False, "progress": False}
  found = kwjax.compress(network, ("8w8a",), views=2, **options)
  assert {len(images) for images in seen} == {16}
  np.testing.assert_array_equal(seen[0][::2], found.images.images[:8])
  assert not np.array_equal(seen[0][1::2], seen[0][::2])
  assert "8 images (2 views of each) calibrate" in str(found.decisions[0])
  seen.clear()
  kwjax.compress(network, ("8w8a",), images=IMAGES, **options)
  assert {len(images) for images in seen} == {9}


def test_given_images_take_the_place_of_synthetic_ones(network: kwjax.Network, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(recipe, "make_images", lambda *_, **__: pytest.fail("images were synthesized"))
  images = IMAGES.copy()
  images[:, 0, 0], images[:, 0, 1] = 0.0, 1.0
  found = kwjax.compress(network, ("8w8a",), key=KEY, images=images, finetune=False, progress=False)
  assert found.scheme == "given"
  assert (found.used, len(found.images.images)) == (9, 12)
  order = [int(np.flatnonzero((images == image).all((1, 2, 3)))[0]) for image in found.images.images]
  assert sorted(order) == list(range(12))
  assert order != list(range(12))
  # Every image reaches from 0 to 1, and the first layer sees (image - mean) / std.
  lo, hi = found.students["8w8a"].ranges["conv1"]
  assert float(lo) == pytest.approx((0.0 - network.input_mean[0]) / network.input_std[0], rel=1e-5)
  assert float(hi) == pytest.approx((1.0 - network.input_mean[0]) / network.input_std[0], rel=1e-5)
  assert found.fine_tuned is None
  assert "left out" in {decision.about: decision for decision in found.decisions}["fine-tuning of 8w8a"].choice


CONFIG = kwjax.SynthesisConfig.for_network("inception", 8)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"bits": ()}, "bits needs one or more different precisions"),
    ({"bits": ("4w4a", "4w4a")}, "different precisions"),
    ({"bits": "4w4a"}, "sequence of precisions"),
    ({"bits": ("9w9a",)}, "9w9a"),
    ({"scheme": "bn"}, "unknown scheme 'bn'; known: bns, inception"),
    ({"calibration": "worst"}, "unknown calibration 'worst'; known: best, paper"),
    ({"weights": "nothing"}, "weight scheme 'nothing'"),
    ({"overrides": {"layer9": "8w8a"}}, "layer9"),
    ({"num_images": 0}, "num_images must be at least 1, found 0"),
    ({"views": 0}, "views must be at least 1, found 0"),
    (
      {"views": 2, "scheme": "gaussian"},
      "synthesized with an augmentation, and gaussian images are not",
    ),
    (
      {"views": 2, "images": IMAGES},
      "synthesized with an augmentation, and given images are not",
    ),
    ({"held_out": -1}, "held_out must be at least 0, found -1"),
    ({"config": CONFIG}, "config is of the scheme 'inception', but scheme is 'bns'"),
    ({"images": IMAGES, "config": CONFIG}, "images are given"),
    ({"images": IMAGES[:, :4]}, "takes images of 8x8x3, found 4x8x3"),
    ({"images": IMAGES, "num_images": 12, "held_out": 1}, "images holds 12, too few for 12"),
    ({"images": 300 * IMAGES}, "images"),
    ({"images": "nowhere.npz"}, "nowhere.npz"),
    ({"baselines": {"bns": IMAGES}}, "a baseline cannot be called 'bns'"),
    ({"baselines": {"../up": IMAGES}}, "a baseline cannot be called"),
    ({"eval_data": (IMAGES, LABELS + 1)}, "labels must be at least 0 and below 10"),
    ({"finetune": kwjax.FineTuning(batch_size=0)}, "batch_size must be at least 1"),
    ({"checkpoint_steps": 0}, "checkpoint_steps must be at least 1"),
    ({"devices": 99}, "99 devices"),
  ],
)
def test_bad_arguments_are_one_sentence_before_any_work(
  tmp_path: pathlib.Path, network: kwjax.Network, given: dict[str, Any], message: str
) -> None:
  arguments: dict[str, Any] = {"bits": ("4w4a",), "key": KEY, "workdir": tmp_path / "run", **given}
  with pytest.raises(KwjaxError) as error:
    kwjax.compress(network, **arguments)
  assert message in str(error.value)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


def test_without_batch_norm_there_is_nothing_to_synthesize_from() -> None:
  with pytest.raises(KwjaxError, match="BatchNorm"):
    kwjax.compress(network_without_batch_norm(batch_norm=False), key=KEY, progress=False)
