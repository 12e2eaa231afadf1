"""What users get wrong: each case makes it in a folder, and says how the one sentence that follows reads."""

from __future__ import annotations

import io
import pathlib
import pickle
import zipfile
import zlib
from collections.abc import Callable

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from kwjax.network import Network, save_network
from kwjax.network_files import DESCRIPTION_FILE, WEIGHTS_FILE
from kwjax.runtime.result_store import ResultStore
from tests.end_to_end import jobs
from tests.weights_conversion import checkpoint_files as written
from weights_conversion.mapping import flax_entries

ARCH = "resnet20"
Case = Callable[[pathlib.Path], list[str]]
"""Makes what is wrong in a folder and returns the options that name it."""


def state_dict() -> dict[str, np.ndarray]:
  """All the arrays of a ResNet-20 by their PyTorch names."""
  names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
  return {
    ".".join([*entry.module, names[entry.path[-1]]]).replace("_", ".", 1).replace("running.", "running_")
    if entry.module[0].startswith("layer")
    else ".".join([*entry.module, names[entry.path[-1]]]): np.ones(entry.torch_shape, np.float32)
    for entry in flax_entries(ARCH)
  }


def weights(change: Callable[[dict[str, np.ndarray]], object]) -> Case:
  """A PyTorch file in which something was changed."""

  def make(folder: pathlib.Path) -> list[str]:
    arrays = state_dict()
    change(arrays)
    return ["--arch", ARCH, "--weights", str(written.save_state_dict(folder / "weights.pth", arrays))]

  return make


def weight_file(content: bytes | Callable[[pathlib.Path], object]) -> Case:
  """A file in place of weights."""

  def make(folder: pathlib.Path) -> list[str]:
    path = folder / "weights.pth"
    _ = path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return ["--arch", ARCH, "--weights", str(path)]

  return make


def cut_off(path: pathlib.Path) -> None:
  written.save_state_dict(path, state_dict())
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def hostile(path: pathlib.Path) -> None:
  body = written.call(written.named("os", "system"), written.text(f"touch {path.parent / 'it_ran'}"))
  written.write_zip(path, written.program(body), {})


def fill(name: str, value: float) -> Callable[[dict[str, np.ndarray]], object]:
  return lambda arrays: arrays[name].__setitem__(0, value)


def stored(
  change: Callable[[Network], Network] | None = None, then: Callable[[pathlib.Path], object] | None = None
) -> Case:
  """A network folder in which something was changed before, or after, it was written."""

  def make(folder: pathlib.Path) -> list[str]:
    network = jobs.tiny_network()
    save_network(change(network) if change else network, folder / "changed")
    if then:
      then(folder / "changed")
    return ["--network", str(folder / "changed")]

  return make


def with_leaf(path: str, change: Callable[[jax.Array], jax.Array]) -> Callable[[Network], Network]:
  def changed(network: Network) -> Network:
    flat = flax.traverse_util.flatten_dict(dict(network.variables), sep="/")
    flat[path] = change(flat[path])
    return network.replace(variables=flax.traverse_util.unflatten_dict(flat, sep="/"))

  return changed


def data(**arrays: np.ndarray) -> Case:
  """An .npz of these arrays as labelled images."""

  def make(folder: pathlib.Path) -> list[str]:
    np.savez(folder / "bad.npz", **arrays)
    return ["--eval-data", str(folder / "bad.npz")]

  return make


def data_file(name: str, content: bytes) -> Case:
  def make(folder: pathlib.Path) -> list[str]:
    (folder / name).write_bytes(content)
    return ["--eval-data", str(folder / name)]

  return make


def pickled_data(folder: pathlib.Path) -> list[str]:
  """An object array, which NumPy stores as a pickle."""
  np.savez(folder / "bad.npz", images=np.array([{"a": 1}], dtype=object), labels=np.zeros(1, np.int32))
  return ["--eval-data", str(folder / "bad.npz")]


def claiming_data(folder: pathlib.Path) -> list[str]:
  """An .npz whose array says that it has a billion images, and holds none."""
  header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 8, 8, 3), }"
  header += b" " * (-(len(header) + 11) % 64) + b"\n"
  with zipfile.ZipFile(folder / "bad.npz", "w") as archive:
    archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
  return ["--eval-data", str(folder / "bad.npz")]


def image_folder(*, broken: bool) -> Case:
  def make(folder: pathlib.Path) -> list[str]:
    place = folder / "pictures"
    place.mkdir()
    if broken:
      PIL.Image.new("RGB", (8, 8)).save(place / "0_good.png")
      (place / "0_broken.png").write_bytes((place / "0_good.png").read_bytes()[:40])
    else:
      (place / "notes.txt").write_text("no image")
    return ["--eval-data", str(place)]

  return make


def options(*texts: str) -> Case:
  return lambda folder: list(texts)


def network_file(folder: pathlib.Path) -> list[str]:
  (folder / "file").write_text("")
  return ["--network", str(folder / "file")]


def bomb(folder: pathlib.Path) -> list[str]:
  """A PNG of a hundred bytes that claims ten thousand million pixels."""
  (folder / "pictures").mkdir()
  path = folder / "pictures" / "0_bomb.png"
  PIL.Image.new("RGB", (8, 8)).save(path)
  content = bytearray(path.read_bytes())
  content[16:24] = (100_000).to_bytes(4, "big") * 2
  content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
  path.write_bytes(content)
  return ["--eval-data", str(folder / "pictures")]


def with_password(folder: pathlib.Path) -> list[str]:
  """A zip of one image that says that it is encrypted."""
  buffer = io.BytesIO()
  PIL.Image.new("RGB", (8, 8)).save(buffer, "png")
  with zipfile.ZipFile(folder / "bad.zip", "w") as archive:
    archive.writestr("0_secret.png", buffer.getvalue())
  content = bytearray((folder / "bad.zip").read_bytes())
  for start, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
    content[content.index(start) + place] |= 1
  (folder / "bad.zip").write_bytes(content)
  return ["--eval-data", str(folder / "bad.zip")]


def damaged_index(folder: pathlib.Path) -> list[str]:
  """A zip of one image with a flipped bit in the directory at its end, whose own record still looks whole."""
  with zipfile.ZipFile(folder / "bad.zip", "w") as archive:
    archive.writestr("0_a.png", b"an image")
  content = bytearray((folder / "bad.zip").read_bytes())
  content[content.index(b"PK\x01\x02")] ^= 1
  (folder / "bad.zip").write_bytes(content)
  assert zipfile.is_zipfile(folder / "bad.zip")
  return ["--eval-data", str(folder / "bad.zip")]


def in_a_file(folder: pathlib.Path) -> list[str]:
  (folder / "file").write_text("")
  return ["--workdir", str(folder / "file")]


def used_folder(folder: pathlib.Path) -> list[str]:
  """The folder of a run with other settings."""
  ResultStore(folder / "used", {"seed": 7})
  return ["--workdir", str(folder / "used")]


def edited_settings(folder: pathlib.Path) -> list[str]:
  path = folder / "used" / "settings.json"
  ResultStore(folder / "used", {"seed": 7})
  path.write_text(path.read_text().replace("7", "0", 1))
  return ["--workdir", str(folder / "used")]


def foreign_folder(folder: pathlib.Path) -> list[str]:
  (folder / "mine").mkdir()
  (folder / "mine" / "thesis.txt").write_text("precious")
  return ["--workdir", str(folder / "mine"), "--no-resume"]


def without_batch_norm(folder: pathlib.Path) -> list[str]:
  """A network that has lost its statistics: what there is does not fit the architecture, which has BatchNorm."""
  network = jobs.tiny_network()
  save_network(network.replace(variables={"params": network.variables["params"]}), folder / "changed")
  return ["--network", str(folder / "changed")]


PIXELS = np.zeros((3, 8, 8, 3), np.uint8)
LABELS = np.zeros(3, np.int32)
NAN = float("nan")

CASES: dict[str, tuple[Case, str]] = {
  "no network": (options(), "no network was given"),
  "unknown arch": (options("--arch", "resnet21", "--weights", "x.pth"), "unknown model 'resnet21'"),
  "wrong arch": (lambda f: ["--arch", "wrn16_1", *weights(lambda a: None)(f)[2:]], "is it another architecture|does not fit"),
  "arch without weights": (options("--arch", ARCH), "belong together"),
  "no such weights": (options("--arch", ARCH, "--weights", "nowhere.pth"), r"nowhere\.pth: no such file"),
  "missing key": (weights(lambda a: a.pop("conv1.weight")), r"1 missing: conv1\.weight"),
  "extra key": (weights(lambda a: a.update(extra=np.ones(2, np.float32))), "1 unexpected: extra"),
  "misshapen key": (weights(lambda a: a.update({"conv1.weight": np.ones((16, 3, 5, 5), np.float32)})), "1 misshapen: conv1"),
  "NaN weights": (weights(fill("linear.bias", NAN)), r"linear\.bias \(1 of 10 values are NaN"),
  "infinite weights": (weights(fill("conv1.weight", np.inf)), r"conv1\.weight .* NaN or infinite"),
  "negative variance": (weights(fill("bn1.running_var", -1e-3)), r"bn1\.running_var \(1 of 16 variances are negative"),
  "hostile pickle": (weight_file(hostile), r"refused, nothing was run: .*os\.system"),
  "pickle of a plain object": (weight_file(pickle.dumps({"a": 1}, 2)), "not one that torch.save wrote"),
  "cut-off file": (weight_file(cut_off), "cut off or damaged"),
  "empty file": (weight_file(b""), "the file is empty"),
  "web page": (weight_file(b"<!DOCTYPE html><html>"), "web page"),
  "weights are a folder": (lambda f: ["--arch", ARCH, "--weights", str(f)], "it is a folder"),
  "network is a file": (network_file, r"network\.json cannot be read: Not a directory"),
  "no network folder": (lambda f: ["--network", str(f / "nowhere")], r"nowhere is not a kwjax network"),
  "folder without weights": (stored(then=lambda f: (f / WEIGHTS_FILE).unlink()), r"model\.safetensors cannot be read"),
  "folder without description": (stored(then=lambda f: (f / DESCRIPTION_FILE).unlink()), r"it has no network\.json"),
  "edited description": (
    stored(then=lambda f: (f / DESCRIPTION_FILE).write_text((f / DESCRIPTION_FILE).read_text().replace("0.45", "0.46"))),
    r"network\.json is damaged or was edited",
  ),
  "folder with NaN": (stored(with_leaf("params/linear/bias", lambda a: a * NAN)), r"params/linear/bias \(10 of 10"),
  "folder with negative variance": (stored(with_leaf("batch_stats/bn1/var", jnp.negative)), "16 negative variances"),
  "no BatchNorm statistics": (without_batch_norm, "missing batch_stats/bn1/mean"),
  "both networks": (options("--network", "x", "--arch", ARCH), "not both"),
  "empty data": (data(images=PIXELS[:0], labels=LABELS[:0]), "holds no images"),
  "data of another shape": (data(images=PIXELS[..., 0], labels=LABELS), r"expected numbers \[n,h,w,c\]"),
  "data with other channels": (data(images=PIXELS[..., :2], labels=LABELS), "expected 3 channels"),
  "data that is text": (data(images=np.full((3, 8, 8, 3), "a"), labels=LABELS), "expected numbers"),
  "pixels out of range": (data(images=PIXELS + np.float32(2), labels=LABELS), r"must be in \[0, 1\]"),
  "NaN pixels": (data(images=PIXELS + np.float32(NAN), labels=LABELS), "without NaN"),
  "labels out of range": (data(images=PIXELS, labels=LABELS + 10), "labels must be at least 0 and below 10"),
  "negative labels": (data(images=PIXELS, labels=LABELS - 1), "labels must be at least 0"),
  "too few labels": (data(images=PIXELS, labels=LABELS[:2]), "expected 3 integer labels"),
  "labels that are fractions": (data(images=PIXELS, labels=LABELS + 0.5), "expected 3 integer labels"),
  "arrays of other names": (data(pictures=PIXELS), "expected one of"),
  "data that is no npz": (data_file("bad.npz", b"not an archive"), r"cannot read .*bad\.npz"),
  "cut-off zip": (data_file("bad.zip", b"PK\x03\x04 cut off"), "neither an .npz, a zip"),
  "zip with a damaged index": (damaged_index, r"cannot read .*bad\.zip: Bad magic number for central directory"),
  "object arrays": (pickled_data, r"cannot read .*bad\.npz: Object arrays"),
  "npz that claims a billion images": (claiming_data, r"cannot read .*bad\.npz"),
  "no such data": (options("--eval-data", "nowhere"), "no such data: nowhere"),
  "image folder without images": (image_folder(broken=False), "holds no images"),
  "broken image": (image_folder(broken=True), r"cannot read image 0_broken\.png"),
  "image that claims too many pixels": (bomb, r"cannot read image 0_bomb\.png: Image size \(10000000000 pixels\)"),
  "zip with a password": (with_password, r"cannot read image 0_secret\.png: .*encrypted"),
  "tfds data that is unknown": (options("--eval-data", "tfds:no_such_set"), "knows no data set no_such_set"),
  "0 images": (options("--images", "0"), "--images must be at least 1, found 0"),
  "no held-out images": (options("--held-out", "0"), "--held-out must be at least 1"),
  "negative steps": (options("--steps", "-1"), "--steps must be at least 0"),
  "batch of 0": (options("--batch-size", "0"), "--batch-size must be at least 1"),
  "batch larger than memory": (options("--images", "1000000000", "--batch-size", "1000000000"), "GiB of memory"),
  "fine-tuning batch larger than memory": (options("--distill-batch-size", "1000000000"), "choose a smaller --batch-size"),
  "unknown bits": (options("--bits", "four"), "cannot read bits 'four'"),
  "0 bits": (options("--bits", "0w8a"), "'0w8a' are out of range"),
  "33 bits": (options("--bits", "33w8a"), "'33w8a' are out of range"),
  "0 bit activations": (options("--bits", "4w0a"), "'4w0a' are out of range"),
  "bits twice": (options("--bits", "4w4a", "4w4a"), "different precisions"),
  "bits of the ends": (options("--first-last", "9w9a"), "'9w9a' are out of range"),
  "pattern that matches no layer": (options("--overrides", "layer9=8w8a"), "'layer9' matches no layer"),
  "pattern that is no expression": (options("--overrides", "([=8w8a"), "not a regular expression"),
  "override without bits": (options("--overrides", "conv1"), "PATTERN=BITS"),
  "workdir is a file": (in_a_file, "file as working folder: it is a file"),
  "workdir that cannot be made": (options("--workdir", "/proc/kwjax/run"), "cannot use /proc/kwjax/run as working folder"),
  "workdir of other settings": (used_folder, "seed is 7 there and 0 now"),
  "workdir whose settings were edited": (edited_settings, r"settings\.json is damaged or was edited"),
  "workdir that is somebody else's": (foreign_folder, "holds none of a run"),
  "negative seed": (options("--seed", "-1"), "--seed must be at least 0 and below 2.32, found -1"),
  "huge seed": (options("--seed", str(1 << 70)), "--seed must be at least 0"),
  "more devices than there are": (options("--devices", "99"), "99 devices were asked for"),
  "0 devices": (options("--devices", "0"), "0 devices were asked for"),
  "learning rate of 0": (options("--distill-learning-rate", "0"), "must be a positive number"),
  "learning rate NaN": (options("--distill-learning-rate", "nan"), "must be a positive number"),
  "no checkpoints": (options("--checkpoint-steps", "0"), "--checkpoint-steps must be at least 1"),
}  # fmt: skip
