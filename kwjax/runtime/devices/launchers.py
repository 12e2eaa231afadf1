"""Who has started this process as one of several: what the user says, and what SLURM, Open MPI and Cloud TPU say."""

from __future__ import annotations

import importlib.util
import os
import pathlib

from kwjax.errors import KwjaxError

TPU_METADATA = "the metadata of this Cloud TPU"
_PCI_DEVICES = pathlib.Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"  # the vendor number of TPU chips


def check(coordinator: str, num_processes: int, process_id: int) -> None:
  """Refuse values that no run can have.

  Raises:
    KwjaxError: which of them, and why.
  """
  host, separator, port = coordinator.rpartition(":")
  if not (separator and host and port.isdecimal() and 0 < int(port) < 65536):
    raise KwjaxError(f"--coordinator must be HOST:PORT such as 10.0.0.1:1234, found {coordinator!r}")
  if num_processes < 1:
    raise KwjaxError(f"--num-processes must be at least 1, found {num_processes}")
  if not 0 <= process_id < num_processes:
    raise KwjaxError(f"--process-id must be at least 0 and below --num-processes {num_processes}, found {process_id}")


def detected() -> str | None:
  """What has started more than one process, among the launchers that JAX takes the three values from; else None."""
  # SLURM_NTASKS alone also stands in a batch script that runs once, outside srun.
  for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
    if os.environ.get(name, "1") not in ("", "1"):
      return name
  for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
    if "," in os.environ.get(name, ""):
      return name
  return TPU_METADATA if "TPU_SKIP_MDS_QUERY" not in os.environ and _is_cloud_tpu() else None


def _is_cloud_tpu() -> bool:
  """Whether this machine has TPU chips and the library that drives them."""
  if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
    return False
  return any(path.read_text().strip() == _GOOGLE for path in _PCI_DEVICES.glob("*/vendor"))
