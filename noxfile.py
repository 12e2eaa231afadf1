"""What CI checks, each as one command: `nox -s lint`; `nox -l` lists all."""

import pathlib
import re
import shutil

import nox

nox.options.sessions = ["lint", "types", "tests", "oldest", "docs", "wheel"]
nox.options.reuse_existing_virtualenvs = True

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
# The extras that the tests of `oldest` use.
OLDEST_EXTRAS = "demo,onnx,stablehlo,tensorboard"
# Fast tests that meet the interface of every dependency: JAX, Flax, optax, orbax, tensorflow-datasets, onnx, jinja2, pooch.
REPRESENTATIVE = [
  "tests/batchnorm",
  "tests/package/test_imports.py",
  "tests/package/test_optional.py",
  "tests/quantization/test_fake_quant.py",
  "tests/quantization/test_grids.py",
  "tests/quantization/test_rules.py",
  "tests/quantization/test_integer.py",
  "tests/distillation/test_schedule.py",
  "tests/distillation/test_losses.py",
  "tests/analysis/test_figures.py",
  "tests/analysis/test_roc.py",
  "tests/runtime/test_checkpoint.py",
  "tests/runtime/test_data_tfds.py",
  "tests/runtime/test_report.py",
  "tests/runtime/test_tensorboard.py",
  "tests/runtime/test_workdir.py",
  "tests/synthesis/test_store_tfds.py",
  "tests/export/test_onnx.py",
  "tests/weights_conversion/test_download.py",
]


def lower_bounds(*names: str) -> list[str]:
  """Dependencies at their lower bounds: `jax>=0.10` -> `jax==0.10`."""
  found = (re.match(r"([\w-]+)>=([\d.]+)", dependency) for dependency in PROJECT["dependencies"])
  return [f"{match[1]}=={match[2]}" for match in found if match and match[1] in names]


@nox.session
def lint(session: nox.Session) -> None:
  """Ruff: rules and format."""
  session.install("ruff>=0.9")
  session.run("ruff", "check", ".")
  session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
  """Types of the packages, the experiments and the benchmarks, by mypy."""
  session.install("-e", ".[test]")
  session.run("mypy")


@nox.session(python=["3.11", "3.12", "3.13"])
@nox.parametrize("jax", ["newest", "oldest"])
def tests(session: nox.Session, jax: str) -> None:
  """The README's test command, with the newest JAX or the oldest that pyproject.toml allows."""
  session.install("-e", ".[test]", *(lower_bounds("jax", "jaxlib") if jax == "oldest" else []))
  session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python="3.11", venv_backend="uv")
def oldest(session: nox.Session) -> None:
  """Every direct dependency at its lower bound, and the fast tests that use it."""
  session.install("--resolution", "lowest-direct", "-e", f".[{OLDEST_EXTRAS}]", "pytest>=8.0", "hypothesis>=6.100")
  # One process, so that pytest-xdist is not needed.
  options = "--strict-markers --import-mode=importlib"
  tests = session.posargs or REPRESENTATIVE
  session.run("python", "-m", "pytest", "-q", "-m", "not slow", "-o", f"addopts={options}", *tests)


@nox.session
def docs(session: nox.Session) -> None:
  """The documentation; every warning is an error."""
  session.install("-e", ".[docs]")
  session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())


@nox.session
def wheel(session: nox.Session) -> None:
  """Wheel and sdist in `dist/`, and the wheel's own checks."""
  session.install("build>=1.2", "twine>=6.0")
  shutil.rmtree("dist", ignore_errors=True)
  session.run("python", "-m", "build")
  session.run("twine", "check", "--strict", *map(str, pathlib.Path("dist").iterdir()))
