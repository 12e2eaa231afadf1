"""Block reconstruction: rounding offsets and activation steps that give each unit of a network its float outputs."""

from kwjax.reconstruction.config import ReconstructConfig
from kwjax.reconstruction.report import UnitReport, describe
from kwjax.reconstruction.run import reconstruct, reconstruct_with_report
from kwjax.reconstruction.units import Unit, find_units

__all__ = [
  "ReconstructConfig",
  "Unit",
  "UnitReport",
  "describe",
  "find_units",
  "reconstruct",
  "reconstruct_with_report",
]
