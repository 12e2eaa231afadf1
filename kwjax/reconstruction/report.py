"""What a reconstruction did to each unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from kwjax.reconstruction.units import Unit


@dataclasses.dataclass(frozen=True)
class UnitReport:
  """What the reconstruction of a unit did.

  Attributes:
    unit: its name.
    layers: in it.
    before: error of the calibrated unit behind the units that are reconstructed: squared, summed over channels, averaged
      over positions and images.
    after: the same with the new weights and ranges.
    changed: share of the weights that are no longer rounded to the nearest level.
    kept: whether the new ones are kept; else the error would have grown, and the unit stays as it was calibrated.
    seconds: that it took.
  """

  unit: str
  layers: tuple[str, ...]
  before: float
  after: float
  changed: float
  kept: bool
  seconds: float

  def to_row(self) -> dict[str, float]:
    """The numbers, for a checkpoint."""
    row = dataclasses.asdict(self)
    return {name: float(row[name]) for name in ("before", "after", "changed", "kept", "seconds")}

  @classmethod
  def from_row(cls, row: Mapping[str, float], unit: Unit) -> UnitReport:
    """A report from the row of `to_row`."""
    kept = bool(row["kept"])
    return cls(unit.name, unit.layers, row["before"], row["after"], row["changed"], kept, row["seconds"])


def describe(reports: Sequence[UnitReport]) -> str:
  """A table of the units: error before and after, and share of the roundings that changed."""
  width = max(len(report.unit) for report in reports)
  lines = [f"{'unit':{width}}  error before      after  changed"]
  for report in reports:
    note = "" if report.kept else "  not kept"
    lines.append(f"{report.unit:{width}}  {report.before:12.4g}  {report.after:9.4g}  {report.changed:6.1%}{note}")
  return "\n".join(lines)
