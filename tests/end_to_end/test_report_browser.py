"""The report in a browser: no error, no request, nothing wider than a phone, every picture there."""

from __future__ import annotations

import functools
import http.server
import json
import pathlib
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from kwjax.analysis import figures
from kwjax.runtime.reporting.report import Picture, Tile, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
PHONE = 375
MEASURED = "everything was measured"
FLAGS = [
  *(
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
  ),
  *("--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
  "--remote-debugging-port=0",  # without a way to speak to it the browser would end at once
]
# Reads a page through a frame as wide as a phone, because a headless window cannot be made that narrow.
FRAME = """<!doctype html><link rel="icon" href="data:,"><body style="margin:0">
<iframe id="frame" style="width:%dpx;height:800px;border:0" src="report.html"></iframe><script>
const frame = document.getElementById("frame");
frame.onload = async () => {
  const page = frame.contentDocument, root = page.documentElement, pictures = [...page.images];
  await Promise.allSettled(pictures.map(picture => picture.decode()));
  const boxes = [...page.querySelectorAll(".scroll")];
  console.info("%s");
  await fetch("/result", {method: "POST", body: JSON.stringify({
    width: root.scrollWidth,
    client: root.clientWidth,
    scrolling: boxes.filter(box => box.scrollWidth > box.clientWidth).length,
    pictures: pictures.filter(picture => picture.naturalWidth > 0).length,
    described: pictures.filter(picture => picture.alt).length,
    widest: Math.max(0, ...pictures.map(picture => picture.getBoundingClientRect().right)),
    taps: [...page.querySelectorAll("a")].map(a => Math.round(a.getBoundingClientRect().height)),
    dangling: [...page.querySelectorAll("a")].filter(a => !page.getElementById(a.hash.slice(1))).length,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    bar: Math.max(0, ...[...page.querySelectorAll(".bars i")].map(bar => bar.getBoundingClientRect().width)),
  })});
};
</script></body>"""


def awkward_report(folder: pathlib.Path) -> None:
  """A report with everything in it that is hard to show: long names, wide tables, many layers, many classes."""
  long = "block_" + "x" * 120
  layers = {f"{long}/{i}": 0.1 * (i + 1) for i in range(40)}
  report = {
    "network": long,
    "protocol": {"teacher": long, long: [long, 1.5]},
    "seed": 0,
    "float": {"top1": 0.9, "count": 1017},
    "jkl": {"start": 0.4, "final": 0.02, "per_layer": layers, "sets": {"bns": {"jkl": 0.02, "without_input": 0.03}}},
    "synthesis": {"images": 48, "seconds": 12.5},
    "calibrated": {"4w4a": {"bns": {"top1": 0.8, "std": 0.01, "seeds": [0, 1]}}},
    "agreement": {"4w4a": {"bns": {"held_out": {"top1": 0.9, "kl": 0.1, "sqnr_db": 9.0, "count": 16}}}},
    "classes": {"counts": {f"class {i}": int(i < 48) for i in range(1000)}, "effective": 48.0, "confidence": 0.9},
    "versions": {"platform": long},
    "command": f"python -m experiments.cifar_bns --network /{long}",
    "notes": [long],
  }
  images = np.random.default_rng(0).random((12, 32, 32, 3))
  bars = figures.layer_bars({"bns": layers}, folder / "bars.png")
  write_report(
    report,
    folder,
    figures={"Divergence by layer": Picture(bars, "In execution order.", "jkl"), long: bars},
    tables={"Table 1": [{f"{long[:40]} {i}": "93.18 ± 0.05" for i in range(9)}]},
    images=[Tile(image, long[:60]) for image in images],
  )


class Site(NamedTuple):
  """A folder on a server, its address, the paths that were asked for and what pages sent back."""

  folder: pathlib.Path
  address: str
  asked: list[str]
  sent: queue.Queue[bytes]


class _Handler(http.server.SimpleHTTPRequestHandler):
  asked: list[str]
  sent: queue.Queue[bytes]

  def do_POST(self) -> None:
    self.sent.put(self.rfile.read(int(self.headers["Content-Length"])))
    self.send_response(204)
    self.end_headers()

  def do_GET(self) -> None:
    self.asked.append(self.path)
    super().do_GET()

  def log_message(self, format: str, *args: object) -> None:
    pass


@pytest.fixture
def site(tmp_path: pathlib.Path) -> Iterator[Site]:
  asked: list[str] = []
  sent: queue.Queue[bytes] = queue.Queue()
  kind = type("Handler", (_Handler,), {"asked": asked, "sent": sent})
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=tmp_path))
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield Site(tmp_path, f"http://127.0.0.1:{server.server_port}", asked, sent)
  server.shutdown()
  server.server_close()


def visit(site: Site) -> tuple[dict[str, Any], list[str]]:
  """What the page measures on a phone, and the lines of the browser's console."""
  (site.folder / "frame.html").write_text(FRAME % (PHONE, MEASURED))
  # A new profile, so that nothing is remembered; no name is resolved, so that nothing outside is reached.
  command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={site.folder / 'profile'}", "--window-size=1200,900"]
  command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"{site.address}/frame.html"]
  log, deadline = site.folder / "browser.log", time.monotonic() + 300
  with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors) as browser:
    try:
      found = site.sent.get(timeout=150)
      lines = console(log)
      # The console is written a moment later, in order: what the page says comes before the last line.
      while not lines or MEASURED not in lines[-1]:
        assert time.monotonic() < deadline, "the console of the browser has no end"
        time.sleep(0.05)
        lines = console(log)
    except queue.Empty:
      pytest.fail(f"the page was not shown:\n{log.read_text(errors='replace')[-2000:]}")
    finally:
      browser.terminate()
  return json.loads(found), lines[:-1]


def console(log: pathlib.Path) -> list[str]:
  """What pages wrote to the browser's console, and what it wrote about them."""
  return [line for line in log.read_text(errors="replace").splitlines() if "CONSOLE" in line]


def test_the_report_opens_on_a_phone_without_errors_or_requests(site: Site) -> None:
  folder, asked = site.folder, site.asked
  awkward_report(folder)
  page, console = visit(site)
  assert not console, "\n".join(console)
  assert [path for path in asked if path not in ("/frame.html", "/report.html", "/favicon.ico")] == []
  assert [name for name in page["requests"] if not name.startswith("data:")] == []
  assert page["width"] <= page["client"] <= PHONE, "the page is wider than the screen"
  assert page["scrolling"] > 0, "the wide table scrolls in its box"
  assert page["widest"] <= PHONE
  assert page["pictures"] == page["described"] == 14
  assert page["bar"] > 100
  assert page["dangling"] == 0
  assert page["taps"]
  assert min(page["taps"]) >= 44


def test_what_a_page_must_not_do_is_noticed(site: Site) -> None:
  folder, asked = site.folder, site.asked
  (folder / "report.html").write_text(
    "<!doctype html><meta name=viewport content='width=device-width'><img src=outside.png>"
    "<script>console.error('broken')</script><div style='width:600px'>wide</div><a href='#nowhere'>x</a>"
  )
  page, console = visit(site)
  assert "/outside.png" in asked
  assert any(name.endswith("/outside.png") for name in page["requests"])
  assert any("broken" in line for line in console)
  assert page["width"] == 608
  assert (page["pictures"], page["described"], page["dangling"]) == (0, 0, 1)


def test_the_policy_of_the_page_stops_what_gets_into_it(site: Site) -> None:
  folder, asked = site.folder, site.asked
  awkward_report(folder)
  text = (folder / "report.html").read_text()
  (folder / "report.html").write_text(text.replace("</body>", "<img src=outside.png><script>alert(1)</script></body>"))
  _, console = visit(site)
  assert "/outside.png" not in asked
  assert sum("Content Security Policy" in line for line in console) == 2
