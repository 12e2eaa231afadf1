"""Accuracy of a quantized network, calibrated on images and, where asked for, fine-tuned on them: one cell of a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments._harness import image_sets
from experiments._harness.accuracy import top1
from experiments._harness.image_sets import Source, identity, short_name
from experiments._harness.study import CellPlan, Setup
from kwjax.cli.options import Sizes
from kwjax.compression.student import fine_tuned
from kwjax.compression.workspace import DISTILL_KEY, Workspace, stream_key
from kwjax.distillation import DistillConfig
from kwjax.intercept import Forwardable
from kwjax.network import Network, fingerprint
from kwjax.quantization import QuantRules
from kwjax.runtime.data import ImageData


def quantization_rules(
  setup: Setup, bits: str, first_last: str, *, weights: str = "auto", overrides: Sequence[tuple[str, str]] = ()
) -> QuantRules:
  """Bits of every layer from --bits and --first-last, checked against the network; `none` treats all layers alike.

  Args:
    setup: of the study.
    bits: #w#a.
    first_last: of the first convolution and of the last layer, or `none`.
    weights: weight scheme.
    overrides: pairs of a pattern and bits.

  Raises:
    KwjaxError: the texts do not say bits, or a layer is not there.
  """
  first_last_bits = None if first_last == "none" else first_last
  rules = QuantRules.parse(bits, first_last=first_last_bits, weights=weights, overrides=overrides)
  rules.resolve(setup.network)
  return rules


def config_for(setup: Setup, chosen: Sizes, scheme: str, **changes: Any) -> DistillConfig:
  """Settings of a fine-tuning on images of a scheme: those of the preset, with some of them changed."""
  base = setup.distill_config(chosen, scheme)
  return base.replace(**changes)


def accuracy_cell(
  setup: Setup,
  source: Source,
  rules: QuantRules,
  config: DistillConfig | None = None,
  *,
  evaluation: ImageData,
  calibrate_on: int,
  tune_on: int = 0,
  description: str = "",
  teacher: Callable[[Network], Forwardable] = lambda network: network,
) -> CellPlan:
  """Top-1 of the student calibrated on the first images of a source, and fine-tuned on the first of them where asked for.

  Args:
    setup: of the study; its sizes say how many draws a calibration has.
    source: of the images.
    rules: bits of every layer.
    config: of the fine-tuning; None: calibration alone.
    evaluation: labelled images, used for nothing else.
    calibrate_on: images for the calibration.
    tune_on: images for the fine-tuning.
    description: what sets this fine-tuning apart, for the protocol; with the configuration it says all of it.
    teacher: what the float network is made into for the fine-tuning.
  """
  chosen = dataclasses.replace(setup.chosen, images=calibrate_on)
  settings = {
    "source": source.settings,
    "rules": rules.to_json(),
    "calibration": [calibrate_on, chosen.calibration_steps, chosen.calibration_batch],
    "distillation": None if config is None else {"images": tune_on, "words": description, "config": config.to_json()},
    "evaluation": identity(evaluation),
  }
  draws = f"{chosen.calibration_steps} x {chosen.calibration_batch} draws"
  protocol = f"{rules.describe()}; the first {calibrate_on} of {source.description} for {draws}"
  if config is not None:
    tuning = f"{description}{config.steps} steps of {config.batch_size}, rate {config.learning_rate:g}"
    protocol += f"; the first {tune_on} for {tuning}"
  protocol += f"; top-1 on {len(evaluation)} images of {short_name(evaluation)}"

  def compute(workspace: Workspace, seed: int) -> Mapping[str, Any]:
    images = source.images(workspace, seed)[: max(calibrate_on, tune_on)]
    student = image_sets.calibrated(workspace, source, rules, chosen, seed, images=images)
    if config is not None:
      key = stream_key(seed, DISTILL_KEY)
      student = fine_tuned(workspace, student, images[:tune_on], config, key=key, teacher=teacher(workspace.network))
    return {**top1(workspace, student, evaluation), "images": len(images)}

  return CellPlan(settings, protocol, compute)


def float_score(workspace: Workspace, evaluation: ImageData) -> dict[str, Any]:
  """`float` of report.json: top-1 of the network itself, measured once."""
  name = f"float-{image_sets.digest([fingerprint(workspace.network), identity(evaluation)])}"
  score = workspace.results.once(name, lambda: top1(workspace, workspace.network, evaluation))
  return {"top1": score["value"], "count": score["count"]}
