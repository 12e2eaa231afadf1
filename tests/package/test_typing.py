"""The package is typed for those who use it: mypy accepts a program that uses it rightly and finds each mistake."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

import kwjax

pytest.importorskip("mypy", reason="needs the extra dev")

# A line that must be refused ends with the code of mypy's error.
CLIENT = """
import flax.linen as nn
import jax
import kwjax
from kwjax.quantization import RangeTable

network: kwjax.Network = kwjax.load_network("folder")
reveal_type(network)  # note: kwjax.network.Network
config = kwjax.SynthesisConfig.for_network("bns", image_size=32)
samples = kwjax.synthesize(network, config, num_images=4, key=jax.random.key(0))
reveal_type(samples.images)  # note: ndarray
rules = kwjax.QuantRules.parse("4w4a", first_last="8w8a", overrides={"1x1": "8w8a"})
ranges: kwjax.Ranges = kwjax.calibrate(network, samples.images, rules, key=jax.random.key(1))
student: kwjax.QuantizedNetwork = kwjax.quantize(network, rules, ranges)
student = kwjax.distill(student, network, samples.images, kwjax.DistillConfig.preset("short"), key=jax.random.key(2))
logits: jax.Array = student.apply(samples.images)
also: jax.Array = network.apply(logits)
found: kwjax.Similarity = kwjax.measure(network, samples.images)
number: float = kwjax.evaluate(student, samples.images, samples.labels).top1
moments: kwjax.Moments = kwjax.reference_moments(network)["bn"]
divergence: jax.Array = kwjax.gaussian_kl(moments, moments)

def own(module: nn.Module, variables: dict[str, jax.Array]) -> kwjax.Network:
  return kwjax.Network(module, variables, image_shape=(8, 8, 1), input_mean=[0.5], input_std=[0.25])

kwjax.load_network(3)  # error: arg-type
kwjax.synthesize(network, config, num_images=4)  # error: call-arg
kwjax.synthesize(network, rules, num_images=4, key=jax.random.key(0))  # error: arg-type
kwjax.quantize(network, ranges, rules)  # error: arg-type
wrong: kwjax.Network = kwjax.quantize(network, rules, ranges)  # error: assignment
kwjax.no_such_name  # error: attr-defined
number = kwjax.measure(network, samples.images)  # error: assignment
kwjax.QuantRules.parse("4w4a", weights=4)  # error: arg-type
samples.image  # error: attr-defined
network.apply([[1.0]])  # error: arg-type
"""


# Only what the annotations of kwjax are made of is read of other packages, which takes a tenth of the time.
SETTINGS = """
[mypy]
strict = True
follow_imports = silent
[mypy-flax.*,jax.*,orbax.*,tensorflow_datasets.*,matplotlib.*,PIL.*,optax.*,chex.*,tqdm.*,safetensors.*,onnx.*,scipy.*]
follow_imports = skip
[mypy-jax,jax._src.basearray]
follow_imports = silent
"""


@pytest.mark.slow
def test_a_client_is_checked_against_the_annotations(tmp_path: pathlib.Path) -> None:
  assert (pathlib.Path(kwjax.__file__).parent / "py.typed").is_file()
  (tmp_path / "client.py").write_text(CLIENT)
  (tmp_path / "mypy.ini").write_text(SETTINGS)
  # mypy ignores an editable installation, whose folder is nevertheless where this test's kwjax comes from.
  search = {"MYPYPATH": str(pathlib.Path(kwjax.__file__).parents[1])}
  done = subprocess.run(
    [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--cache-dir=cache", "client.py"],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env={**search, "PATH": "", "HOME": str(tmp_path)},
    check=False,
  )
  said = re.findall(r"^client\.py:(\d+): (error|note): (.*?)(?:  \[(.*)\])?$", done.stdout, re.MULTILINE)
  errors = {(int(line), code) for line, kind, _, code in said if kind == "error"}
  expected = {
    (number, line.rpartition("# error: ")[2])
    for number, line in enumerate(CLIENT.splitlines(), 1)
    if "# error: " in line
  }
  assert errors == expected, done.stdout + done.stderr
  revealed = [text for _, kind, text, _ in said if kind == "note" and "Revealed" in text]
  wanted = [line.rpartition("# note: ")[2] for line in CLIENT.splitlines() if "# note: " in line]
  assert all(want in text for want, text in zip(wanted, revealed, strict=True)), revealed
