"""Every form of data set, against pixels written by the test, and every kind of bad input."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import io
import os
import pathlib
import zipfile
from typing import Any

import numpy as np
import PIL.Image
import pytest

from kwjax.errors import DataError
from kwjax.runtime.data.images import array_data, content_digest, load_data
from kwjax.runtime.data.readers import fit


def _pixels(count: int, height: int = 8, width: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def _png(pixels: np.ndarray, mode: str | None = None) -> bytes:
  file = io.BytesIO()
  image = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
  (image.convert(mode) if mode else image).save(file, "png")
  return file.getvalue()


def _write(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  for name, data in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  return root


def _zip(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  with zipfile.ZipFile(path, "w") as archive:
    for name, data in files.items():
      archive.writestr(name, data)
  return path


# --- arrays


@pytest.mark.parametrize("keys", [("images", "labels"), ("x_test", "y_test"), ("test_images", "test_labels")])
def test_npz_reads_uint8_and_float_alike(tmp_path: pathlib.Path, keys: tuple[str, str]) -> None:
  pixels, labels = _pixels(5), np.array([3, 1, 4, 1, 5])
  np.savez(tmp_path / "a.npz", **{keys[0]: pixels, keys[1]: labels[:, None]})
  np.savez_compressed(tmp_path / "b.npz", **{keys[0]: (pixels / 255).astype(np.float64), keys[1]: labels})
  for name in ("a.npz", "b.npz"):
    data = load_data(str(tmp_path / name), image_shape=(8, 8, 3), num_classes=6)
    images, found = data.all()
    assert (len(data), images.dtype, found is not None and found.dtype) == (5, np.float32, np.int32)
    np.testing.assert_allclose(images, pixels / 255, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(found, labels)
    assert images.min() >= 0
    assert images.max() <= 1


def test_npz_splits(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "a.npz"
  test, train = _pixels(2, seed=1), _pixels(3, seed=2)
  np.savez(path, test_images=test, test_labels=[0, 1], x_train=train)
  assert len(load_data(str(path))) == 2
  data = load_data(f"{path}:train")
  assert len(data) == 3
  assert data.labels is None
  np.testing.assert_array_equal(data.read([2, 0]) * 255, train[[2, 0]])
  assert len(load_data(str(path), split="train", limit=2)) == 2
  with pytest.raises(
    DataError, match=r"a\.npz has the arrays \['test_images', .*expected one of \['validation_images'"
  ):
    load_data(f"{path}:validation")
  with pytest.raises(DataError, match="names the split train, but the split test"):
    load_data(f"{path}:train", split="test")


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"images": np.full((2, 4, 4, 3), 1.5)}, r"float64 pixels must be in \[0, 1\] without NaN, found 1.5\.\.1.5"),
    ({"images": np.full((2, 4, 4, 3), np.nan, np.float32)}, r"without NaN, found nan"),
    ({"images": np.full((2, 4, 4, 3), -1, np.int64)}, r"int64 pixels must be in \[0, 255\]"),
    ({"images": np.zeros((2, 4, 4, 3), bool)}, r"expected numbers \[n,h,w,c\], found bool"),
    ({"images": np.zeros((2, 4, 4))}, r"found float64\[2,4,4\]"),
    ({"images": np.zeros((0, 4, 4, 3))}, "holds no images"),
    ({"images": np.zeros((2, 4, 4, 1))}, r"expected 3 channels, found an image \[4,4,1\]"),
    ({"images": np.zeros((2, 3, 4, 4))}, r"expected 3 channels, found an image \[3,4,4\]"),
    ({"images": np.zeros((2, 4, 4, 3)), "labels": np.array([0, 10])}, r"at least 0 and below 10, found 0\.\.10"),
    ({"images": np.zeros((2, 4, 4, 3)), "labels": np.array([-1, 0])}, r"found -1\.\.0"),
    ({"images": np.zeros((2, 4, 4, 3)), "labels": np.array([0])}, r"expected 2 integer labels, found int64\[1\]"),
    ({"images": np.zeros((2, 4, 4, 3)), "labels": np.array([0.0, 1.0])}, "expected 2 integer labels, found float64"),
    ({"images": np.array([{}, {}])}, "Object arrays"),
    ({"pictures": np.zeros((2, 4, 4, 3))}, r"has the arrays \['pictures'\]"),
  ],
)
def test_bad_arrays_are_refused(tmp_path: pathlib.Path, arrays: dict[str, Any], message: str) -> None:
  np.savez(tmp_path / "a.npz", **arrays)
  with pytest.raises(DataError, match=message):
    load_data(str(tmp_path / "a.npz"), image_shape=(4, 4, 3), num_classes=10)


def test_missing_and_unknown_files_are_named(tmp_path: pathlib.Path) -> None:
  with pytest.raises(DataError, match=r"no such data: .*nothing\.npz"):
    load_data(str(tmp_path / "nothing.npz"))
  for name in ("a.npz", "a.zip", "a.bin"):
    (tmp_path / name).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match=name):
      load_data(str(tmp_path / name))
  (tmp_path / "empty").mkdir()
  with pytest.raises(DataError, match="empty holds no images"):
    load_data(str(tmp_path / "empty"))


# --- reading


def test_batches_cover_the_set_once_and_padding_is_marked() -> None:
  pixels = _pixels(7)
  data = array_data(pixels, np.arange(7))
  for pad in (False, True):
    batches = list(data.batches(3, start=1, pad=pad))
    assert [len(images) for images, _, _ in batches] == [3, 3]
    images = np.concatenate([images[valid] for images, _, valid in batches])
    labels = np.concatenate([labels[valid] for _, labels, valid in batches if labels is not None])
    np.testing.assert_array_equal(images, pixels[1:] / np.float32(255))
    np.testing.assert_array_equal(labels, np.arange(1, 7))
  sizes = {pad: [(len(i), int(v.sum())) for i, _, v in data.batches(3, pad=pad)] for pad in (False, True)}
  assert sizes == {False: [(3, 3), (3, 3), (1, 1)], True: [(3, 3), (3, 3), (3, 1)]}
  last, labels, valid = list(data.batches(3, pad=True))[-1]
  assert not last[~valid].any()
  assert labels is not None
  assert labels[~valid].tolist() == [0, 0]
  with pytest.raises(DataError, match=r"has 7 images, asked for index -1\.\.2"):
    data.read([2, -1])
  with pytest.raises(DataError, match="expected batch_size >= 1"):
    next(data.batches(0))


def test_resize_and_crop_is_the_torchvision_evaluation() -> None:
  torch = pytest.importorskip("torch")
  pixels = _pixels(1, 90, 61)[0]
  found = fit(pixels, (28, 28, 3), "image")
  # torchvision's Resize(32), CenterCrop(28): bilinear with antialiasing on the short side 61 -> 32.
  tensor = torch.tensor(pixels).permute(2, 0, 1)[None].float()
  resized = torch.nn.functional.interpolate(tensor, (int(90 * 32 / 61), 32), mode="bilinear", antialias=True)[0]
  top = round((resized.shape[1] - 28) / 2)
  expected = resized[:, top : top + 28, 2:30].permute(1, 2, 0).numpy() / 255
  # PIL rounds to whole grey levels after each of its two passes.
  np.testing.assert_allclose(found, expected, rtol=0, atol=1.1 / 255)
  # Floats of the same image agree without that rounding.
  exact = fit((pixels / 255).astype(np.float32), (28, 28, 3), "image")
  np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-5)


def test_an_image_that_has_the_margin_is_only_cropped() -> None:
  pixels = _pixels(1, 32, 40)[0]
  np.testing.assert_array_equal(fit(pixels, (28, 28, 3), "image") * 255, pixels[2:30, 6:34])
  np.testing.assert_array_equal(fit(pixels, (32, 40, 3), "image") * 255, pixels)


def test_sets_of_equal_images_are_shown_whole_or_refused() -> None:
  torch = pytest.importorskip("torch")
  pixels = _pixels(2, 96, 96)
  found = array_data(pixels)
  shrunk = dataclasses.replace(found, image_shape=(32, 32, 3)).read([1])[0]
  tensor = torch.tensor(pixels[1]).permute(2, 0, 1)[None].float()
  expected = torch.nn.functional.interpolate(tensor, (32, 32), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
  # PIL rounds to whole grey levels after each of its two passes.
  np.testing.assert_allclose(shrunk, expected.numpy() / 255, rtol=0, atol=1.1 / 255)
  for shape in ((224, 224, 3), (97, 96, 3), (96, 97, 3)):
    with pytest.raises(DataError, match=f"images of 96x96 pixels are smaller than the wanted {shape[0]}x{shape[1]}"):
      dataclasses.replace(found, image_shape=shape).read([0])
  # Of oblong images the centre is shown, over the whole of the shorter side.
  oblong = dataclasses.replace(array_data(_pixels(1, 32, 40)), image_shape=(32, 32, 3))
  np.testing.assert_array_equal(oblong.read([0])[0] * 255, _pixels(1, 32, 40)[0, :, 4:36])


# --- files


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_named_and_foldered_files(tmp_path: pathlib.Path, form: str) -> None:
  pixels = _pixels(4, seed=3)
  encoded = [_png(p) for p in pixels]
  sets: dict[str, tuple[dict[str, bytes], list[int] | None]] = {
    "named": ({"0_b.png": encoded[0], "0012_n1.png": encoded[1], "7_x.png": encoded[2]}, [12, 0, 7]),
    "inner": ({"in/3_b.png": encoded[0], "in/4_n1.png": encoded[1], "__MACOSX/in/._3_b.png": b"junk"}, [3, 4]),
    "classes": ({"cat/1.png": encoded[0], "ant/9_z.png": encoded[1], "ant/.x.png": b"junk"}, [0, 1]),
    "plain": ({"a.png": encoded[0], "b.png": encoded[1], "readme.txt": b"text"}, None),
    "wnids": ({"n02007558/a.png": encoded[0], "n01440764/b.png": encoded[1]}, [0, 130]),
  }
  for name, (files, labels) in sets.items():
    path = _zip(tmp_path / f"{name}.zip", files) if form == "zip" else _write(tmp_path / name, files)
    data = load_data(str(path), image_shape=(8, 8, 3))
    found = None if data.labels is None else data.labels.tolist()
    assert found == labels, name
    order = [1, 0, 2][: len(data)] if name in ("named", "classes", "wnids") else list(range(len(data)))
    np.testing.assert_array_equal(data.all()[0] * 255, pixels[order], err_msg=name)


def test_all_folders_of_a_wnid_network_with_that_many_classes_count_from_zero(tmp_path: pathlib.Path) -> None:
  path = _write(tmp_path, {f"{w}/a.png": _png(_pixels(1)[0]) for w in ("n02007558", "n01440764")})
  labels = load_data(str(path), num_classes=2).labels
  assert labels is not None
  assert labels.tolist() == [0, 1]


def test_grey_palette_and_transparent_files_become_rgb(tmp_path: pathlib.Path) -> None:
  grey = _pixels(1, channels=1)[0]
  _write(tmp_path, {"0_a.png": _png(grey), "1_b.png": _png(np.repeat(grey, 3, 2), "RGBA")})
  images, _ = load_data(str(tmp_path)).all()
  np.testing.assert_array_equal(images[0] * 255, np.repeat(grey, 3, axis=2))
  np.testing.assert_array_equal(images[0], images[1])
  one, _ = load_data(str(tmp_path), image_shape=(8, 8, 1)).all()
  np.testing.assert_array_equal(one[0] * 255, grey)
  with pytest.raises(DataError, match="1 or 3 channels, 4 are asked for"):
    load_data(str(tmp_path), image_shape=(8, 8, 4))


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_damaged_image_is_named_when_it_is_read(tmp_path: pathlib.Path, form: str) -> None:
  good = _png(_pixels(1, 30, 30)[0])
  for kind, bad in (("cut", good[: len(good) // 2]), ("junk", b"not an image"), ("flip", good[:60] + b"?" + good[61:])):
    files = {"0_a.png": good, "1_bad.png": bad, "2_c.png": good}
    path = _zip(tmp_path / f"{kind}.zip", files) if form == "zip" else _write(tmp_path / kind, files)
    data = load_data(str(path), image_shape=(30, 30, 3))
    data.read([0, 2])
    with pytest.raises(DataError, match=rf"{kind}.*cannot read image 1_bad\.png"):
      data.read([1])


def test_a_byte_flipped_inside_a_zip_is_noticed(tmp_path: pathlib.Path) -> None:
  path = _zip(tmp_path / "a.zip", {"0_a.png": _png(_pixels(1)[0]), "1_b.bmp": b""})
  data = bytearray(path.read_bytes())
  data[100] ^= 1
  path.write_bytes(data)
  with pytest.raises(DataError, match=r"a\.zip: cannot read image 0_a\.png"):
    load_data(str(path), image_shape=(8, 8, 3))


def test_no_flipped_byte_of_a_zips_directory_escapes(tmp_path: pathlib.Path) -> None:
  path = _zip(tmp_path / "a.zip", {"0_a.png": _png(_pixels(1)[0]), "1_b.bmp": b""})
  data, refused = path.read_bytes(), []
  for place in range(data.index(b"PK\x01\x02"), len(data)):
    path.write_bytes(data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :])
    try:
      load_data(str(path), image_shape=(8, 8, 3))
    except DataError as error:
      refused.append(str(error))
  assert refused
  assert all("a.zip" in message for message in refused)
  assert any("Bad magic number for central directory" in message for message in refused)


def test_a_class_folder_that_cannot_be_listed_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  png, scan = _png(_pixels(1)[0]), os.scandir
  root = _write(tmp_path, {"ant/a.png": png, "cat/b.png": png, ".trash/c.png": png})

  def refuse(place: Any = ".") -> Any:  # root may read everything, so the system does not refuse here
    if pathlib.Path(place).name in refused:
      raise PermissionError(errno.EACCES, "Permission denied", str(place))
    return scan(place)

  monkeypatch.setattr(os, "scandir", refuse)
  refused = [".trash"]
  labels = load_data(str(root)).labels
  assert labels is not None
  assert labels.tolist() == [0, 1]  # what holds no images of the set is not looked into
  refused = ["ant"]
  with pytest.raises(DataError, match=r"cannot read .*ant: Permission denied"):
    load_data(str(root))
  with pytest.raises(DataError, match=r"cannot read .*train: No such file"):
    load_data(f"{root}:train")


def test_a_link_to_nothing_is_named(tmp_path: pathlib.Path) -> None:
  root = _write(tmp_path, {"0_a.png": _png(_pixels(1)[0])})
  (root / "1_b.png").symlink_to(root / "nowhere.png")
  with pytest.raises(DataError, match=r"cannot read image 1_b\.png: .*No such file"):
    load_data(str(root)).all()


def test_mixed_names_and_sizes_are_refused(tmp_path: pathlib.Path) -> None:
  png = _png(_pixels(1)[0])
  with pytest.raises(DataError, match=r"image oops\.png is not named CLASS_"):
    load_data(str(_write(tmp_path / "names", {"0_a.png": png, "oops.png": png})))
  with pytest.raises(DataError, match=r"both in class folders and outside of them, such as loose\.png"):
    load_data(str(_write(tmp_path / "mixed", {"a/1.png": png, "loose.png": png})))
  with pytest.raises(DataError, match=r"labels must be at least 0 and below 5, found 0\.\.9"):
    load_data(str(_write(tmp_path / "many", {"0_a.png": png, "9_b.png": png})), num_classes=5)


# --- idx


def _idx(array: np.ndarray) -> bytes:
  return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def test_idx_becomes_padded_rgb(tmp_path: pathlib.Path) -> None:
  test, train = _pixels(3, 28, 28, 1), _pixels(2, 28, 28, 1, seed=1)
  _write(
    tmp_path,
    {
      "t10k-images-idx3-ubyte.gz": gzip.compress(_idx(test[..., 0])),
      "t10k-labels-idx1-ubyte.gz": gzip.compress(_idx(np.array([7, 2, 1]))),
      "train-images-idx3-ubyte": _idx(train[..., 0]),
    },
  )
  data = load_data(str(tmp_path), image_shape=(32, 32, 3), num_classes=10)
  assert data.labels is not None
  assert data.labels.tolist() == [7, 2, 1]
  images = data.all()[0] * 255
  np.testing.assert_array_equal(images[:, 2:30, 2:30], np.repeat(test, 3, axis=-1))
  assert images.sum() == 3 * test.sum(dtype=np.int64)
  np.testing.assert_array_equal(load_data(f"{tmp_path}:train").all()[0] * 255, train)
  path = tmp_path / "t10k-images-idx3-ubyte.gz"
  path.write_bytes(gzip.compress(_idx(test[..., 0])[:-5]))
  with pytest.raises(
    DataError, match=r"cannot read .*t10k-images-idx3-ubyte\.gz: not an idx file of bytes, or cut off"
  ):
    load_data(str(tmp_path))
  path.write_bytes(gzip.compress(_idx(test[..., 0]))[:-50])
  with pytest.raises(DataError, match=r"cannot read .*t10k-images"):
    load_data(str(tmp_path))
  with pytest.raises(DataError, match="has no other images: expected .*found"):
    load_data(f"{tmp_path}:other")


def test_idx_by_prefix_and_by_file(tmp_path: pathlib.Path) -> None:
  letters, mnist = _pixels(2, 28, 28, 1, seed=1), _pixels(3, 28, 28, 1, seed=2)
  _write(
    tmp_path,
    {
      "emnist-letters-test-images-idx3-ubyte.gz": gzip.compress(_idx(letters[..., 0])),
      "emnist-letters-test-labels-idx1-ubyte.gz": gzip.compress(_idx(np.array([26, 1]))),
      "emnist-letters-train-images-idx3-ubyte.gz": gzip.compress(_idx(letters[::-1, ..., 0])),
      "t10k-images.idx3-ubyte": _idx(mnist[..., 0]),
      "t10k-labels.idx1-ubyte": _idx(np.array([3, 1, 2])),
    },
  )
  data = load_data(str(tmp_path / "emnist-letters"))
  assert data.labels is not None
  assert data.labels.tolist() == [26, 1]
  np.testing.assert_array_equal(data.all()[0] * 255, letters)
  np.testing.assert_array_equal(load_data(f"{tmp_path}/emnist-letters:train").all()[0] * 255, letters[::-1])
  by_file = load_data(str(tmp_path / "t10k-images.idx3-ubyte"), image_shape=(32, 32, 3))
  assert by_file.labels is not None
  assert by_file.labels.tolist() == [3, 1, 2]
  with pytest.raises(
    DataError, match=r"several test images, emnist-letters-test-.* and t10k-.*: name one of the files"
  ):
    load_data(str(tmp_path))
  with pytest.raises(DataError, match="no such data"):
    load_data(str(tmp_path / "qmnist"))
  with pytest.raises(DataError, match="images of 28x28 pixels are smaller than the wanted 64x64"):
    load_data(str(tmp_path / "t10k"), image_shape=(64, 64, 1))


def test_an_idx_original_goes_before_its_unpacked_copy(tmp_path: pathlib.Path) -> None:
  one, other = _pixels(1, 28, 28, 1, seed=1), _pixels(1, 28, 28, 1, seed=2)
  _write(
    tmp_path,
    {"t10k-images-idx3-ubyte.gz": gzip.compress(_idx(one[..., 0])), "t10k-images-idx3-ubyte": _idx(other[..., 0])},
  )
  np.testing.assert_array_equal(load_data(str(tmp_path)).all()[0] * 255, one)


# --- real files


def test_real_cifar_subset(shared_data: pathlib.Path) -> None:
  path = shared_data / "cifar10" / "cifar10_subset.npz"
  data = load_data(str(path), image_shape=(32, 32, 3), num_classes=10)
  assert len(data) == 1017
  assert len(load_data(f"{path}:train")) == 5085
  with np.load(path) as arrays:
    np.testing.assert_array_equal(data.read([5, 1016]) * 255, arrays["test_images"][[5, 1016]])


def test_real_imagenet_zip(shared_data: pathlib.Path) -> None:
  path = shared_data / "imagenet" / "imagenet_samples_500.zip"
  data = load_data(str(path), image_shape=(224, 224, 3), num_classes=1000)
  assert data.labels is not None
  np.testing.assert_array_equal(data.labels, np.arange(0, 1000, 2))
  whole = load_data(str(path))
  assert whole.image_shape == (256, 256, 3)
  np.testing.assert_array_equal(data.read([499])[0], whole.read([499])[0, 16:240, 16:240])


def test_a_class_folder_without_images_counts_or_is_refused(tmp_path: pathlib.Path) -> None:
  png = _png(_pixels(1)[0])
  root = _write(tmp_path / "set", {"ant/a.png": png, "cat/b.png": png})
  (root / "bee").mkdir()
  assert load_data(str(root), num_classes=3).labels.tolist() == [0, 2]
  for count in (None, 2):
    with pytest.raises(DataError, match="folder bee holds no images"):
      load_data(str(root), num_classes=count)
  archive = tmp_path / "set.zip"
  with zipfile.ZipFile(archive, "w") as file:
    for name in ("ant/", "ant/a.png", "bee/", "cat/", "cat/b.png"):
      file.writestr(name, png if name.endswith(".png") else b"")
  assert load_data(str(archive), num_classes=3).labels.tolist() == [0, 2]


def test_folders_inside_a_class_folder_belong_to_it(tmp_path: pathlib.Path) -> None:
  png = _png(_pixels(1)[0])
  deep = _write(tmp_path / "deep", {"dog/0.png": png, "dog/beach/sea/1.png": png, "zebra/2.png": png})
  assert load_data(str(deep)).labels.tolist() == [0, 0, 1]
  wrapped = _write(tmp_path / "wrapped", {"val/dog/0.png": png, "val/zebra/2.png": png})
  assert load_data(str(wrapped)).labels.tolist() == [0, 1]
  splits = _write(tmp_path / "splits", {"train/ant/0.png": png, "val/ant/1.png": png, "val/bee/2.png": png})
  with pytest.raises(
    DataError, match="folder train holds no images of its own, only folders with images, such as train/ant"
  ):
    load_data(str(splits))


def test_linked_class_folders_are_followed_and_circles_are_not(tmp_path: pathlib.Path) -> None:
  png = _png(_pixels(1)[0])
  elsewhere = _write(tmp_path / "elsewhere", {"1.png": png})
  root = _write(tmp_path / "set", {"ant/0.png": png, "cat/2.png": png})
  (root / "bee").symlink_to(elsewhere, target_is_directory=True)
  (root / "cat" / "up").symlink_to(root, target_is_directory=True)
  assert load_data(str(root)).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("dtype", "white"), [(np.uint16, 65535), (np.float32, 1.0)])
def test_grey_images_of_more_than_8_bits_keep_their_values(tmp_path: pathlib.Path, dtype: type, white: float) -> None:
  ramp = (np.linspace(0, 1, 64).reshape(8, 8) * white).astype(dtype)
  path = tmp_path / ("0_ramp.png" if dtype is np.uint16 else "0_ramp.tiff")
  PIL.Image.fromarray(ramp).save(path)
  for channels in (1, 3):
    found = load_data(str(tmp_path), image_shape=(8, 8, channels)).all()[0][0]
    np.testing.assert_allclose(found, np.repeat(ramp[:, :, None] / white, channels, 2), atol=1e-6)
  PIL.Image.fromarray(np.full((8, 8), 300.0, np.float32)).save(tmp_path / "1_wild.tiff")
  with pytest.raises(
    DataError, match=r"1_wild\.tiff: expected grey values from 0 to 1 \(PIL's mode F\), found 0 to 300"
  ):
    load_data(str(tmp_path), image_shape=(8, 8, 1)).read([1])


def test_the_digest_of_a_data_set_follows_its_content(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  png = _png(_pixels(1)[0])
  monkeypatch.setenv("HOME", str(tmp_path))
  for name in ("one", "two"):
    _write(tmp_path / name / "set", {"ant/a.png": png, "bee/b.png": png})
  first = content_digest(str(tmp_path / "one" / "set"))
  assert first is not None
  assert content_digest(str(tmp_path / "two" / "set")) == content_digest("~/one/set:test") == first
  (tmp_path / "one" / "set" / "ant").rename(tmp_path / "one" / "set" / "cat")  # all labels are others
  assert content_digest(str(tmp_path / "one" / "set")) != first
  (tmp_path / "two" / "set" / "bee" / "b.png").write_bytes(png + b" ")
  assert content_digest(str(tmp_path / "two" / "set")) != first
  (tmp_path / "a.npz").write_bytes(b"one")
  assert content_digest(str(tmp_path / "a.npz")) == content_digest(f"{tmp_path}/a.npz:validation")
  (tmp_path / "m-t10k-images-idx3-ubyte").write_bytes(b"one")
  before = content_digest(str(tmp_path / "m-"))
  (tmp_path / "m-t10k-images-idx3-ubyte").write_bytes(b"other")
  assert None is not before != content_digest(str(tmp_path / "m-"))
  assert content_digest("tfds:mnist") is None
