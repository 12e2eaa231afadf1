"""Dead leaves as extra data of a fine-tuning: the fourth table of `experiments.noise.leaves_bns`."""

from __future__ import annotations

from experiments._harness.distilled import accuracy_cell
from experiments._harness.image_sets import Source
from experiments._harness.study import CellPlan, Setup
from experiments._harness.tables import Table
from experiments.noise.inputs import LEAVES
from kwjax.compression.workspace import REAL
from kwjax.quantization import QuantRules

BNS, MIXED = "bns", f"bns+{LEAVES}"
ROWS = (REAL, BNS, MIXED)
CALIBRATED, TUNED = "calibrated", "fine-tuned"
BITS, FIRST_LAST = "2w4a", "4w4a"


def table(title: str, steps: int, batch_size: int) -> Table:
  """The empty table of a network.

  Args:
    title: of the table.
    steps: of the fine-tuning.
    batch_size: images a step.
  """
  return Table(
    title,
    ROWS,
    (CALIBRATED, TUNED),
    note=f"{BITS}, first and last layer {FIRST_LAST}. Equal cost: {steps} steps of {batch_size} in every row. All but real are "
    "calibrated with the BNS images alone.",
  )


def plan(setup: Setup, source: Source, column: str) -> CellPlan:
  """How one cell is measured: calibrated with the first images of a source, fine-tuned on all of them.

  Args:
    setup: of the study.
    source: images of the row; of a mixture the BNS images come first.
    column: of the table.
  """
  count, chosen = setup.chosen.images, setup.chosen
  is_tuned = column == TUNED
  config = setup.distill_config(chosen, BNS) if is_tuned else None
  return accuracy_cell(
    setup,
    source,
    QuantRules.parse(BITS, first_last=FIRST_LAST),
    config,
    evaluation=setup.labelled(),
    calibrate_on=count,
    tune_on=2 * count if source.name == MIXED else count,
  )
