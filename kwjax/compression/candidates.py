"""Students that are tried for a precision: the one with the lowest KL from the float network on held-out images is taken."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from kwjax.analysis.scoring import Score, Scorer
from kwjax.compression import decisions, student
from kwjax.compression.decisions import Decision
from kwjax.compression.workspace import RECONSTRUCT_KEY, Workspace
from kwjax.quantization import QuantizedNetwork, QuantRules
from kwjax.quantization.methods import Correction, Method
from kwjax.reconstruction import ReconstructConfig

_ENOUGH_BITS = 8


class Calibrated(NamedTuple):
  """What `best` found.

  Attributes:
    student: with the correction that was taken.
    plain: without one.
    tried: KL on the held-out images with every correction that was tried, the one that was taken first.
  """

  student: QuantizedNetwork
  plain: QuantizedNetwork
  tried: Mapping[Correction, float | None]


class Reconstructed(NamedTuple):
  """What `reconstructed` found.

  Attributes:
    student: that is taken.
    score: of the reconstructed student; None where the calibrated one is taken.
    why: it is.
  """

  student: QuantizedNetwork
  score: Score | None
  why: Decision


def best(
  workspace: Workspace,
  scorer: Scorer,
  bits: str,
  rules: QuantRules,
  method: Method,
  images: np.ndarray,
  *,
  key: jax.Array,
  name: str,
) -> Calibrated:
  """The calibrated student with the correction that brings it closest to the float network.

  Args:
    workspace: where.
    scorer: judges; without held-out images the correction with the fewest assumptions that a choice offers, the means, is taken.
    bits: the precision's name.
    rules: of the precision.
    method: of the calibration; says what is tried.
    images: f32[n,h,w,c] in [0,1].
    key: of the calibration's draws.
    name: of the image set.

  """
  plain = student.uncorrected(workspace, f"ranges-{name}", images, rules, method, key=key, description=name)
  wanted = method.corrections()
  tried = {correction: student.corrected(workspace, plain, images, correction) for correction in wanted}
  if len(wanted) == 1:
    return Calibrated(tried[wanted[0]], plain, {wanted[0]: None})
  found = {
    correction: workspace.results.once(f"tried-{bits}-{correction}", functools.partial(scorer.divergence, candidate))
    for correction, candidate in tried.items()
  }
  known = {correction: kl for correction, kl in found.items() if kl is not None}
  taken: Correction = min(known, key=lambda correction: known[correction]) if known else "means"
  shown = ", ".join(f"{correction} {kl:.3g}" for correction, kl in known.items())
  if known:
    workspace.log(f"corrections of {bits}, KL on held-out images: {shown}; {taken} is taken")
  return Calibrated(tried[taken], plain, {taken: found[taken], **found})


def reconstructed(
  workspace: Workspace,
  scorer: Scorer,
  bits: str,
  rules: QuantRules,
  config: ReconstructConfig,
  calibrated: Calibrated,
  score: Score,
  images: np.ndarray,
  *,
  key: jax.Array,
) -> Reconstructed:
  """The reconstructed student, where that is closer to the float network than the calibrated one.

  Args:
    workspace: where.
    scorer: judges.
    bits: the precision's name.
    rules: of the precision.
    config: of the reconstruction.
    calibrated: the student, of `best`.
    score: its own.
    images: f32[n,h,w,c] in [0,1].
    key: of the compression.
  """
  before = None if score.held_out is None else score.held_out.kl
  if min(rules.bits.weights or 32, rules.bits.activations or 32) >= _ENOUGH_BITS:
    return Reconstructed(calibrated.student, None, decisions.about_reconstruction(bits, before, {}, ()))
  start = time.monotonic()
  key = jax.random.fold_in(key, RECONSTRUCT_KEY)
  made, reports = student.reconstructed(
    workspace, calibrated.plain, images, config, key=key, name=f"reconstruction-{bits}"
  )
  workspace.log(f"reconstructed {len(reports)} units of {bits} in {time.monotonic() - start:.0f} s")
  tried = {"reconstructed": made, "means": student.corrected(workspace, made, images, "means")}
  found = {
    name: workspace.results.once(f"tried-{bits}-{name}-after", functools.partial(scorer.divergence, candidate))
    for name, candidate in tried.items()
  }
  everything: dict[str, float | None] = {"calibrated": before, **found}
  known = {name: kl for name, kl in everything.items() if kl is not None}
  taken = min(known, key=lambda name: known[name]) if known else "reconstructed"
  why = decisions.about_reconstruction(bits, before, {taken: everything[taken], **found}, reports)
  if taken == "calibrated":
    workspace.log(f"the reconstruction of {bits} is no closer to the float network: the calibrated student is kept")
    return Reconstructed(calibrated.student, None, why)
  kept = tried[taken]
  result = workspace.results.once(f"reconstructed-{bits}", functools.partial(scorer.score, kept))
  workspace.log(f"reconstructed {bits}: {Score.from_json(result).describe()}")
  return Reconstructed(kept, Score.from_json(result), why)
