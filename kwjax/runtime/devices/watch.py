"""The connections between the processes of one run: small values that they exchange, and the end of one of them.

Each process keeps one TCP connection to process 0, which passes on what it learns. Two things go through them.

- Values of `Watch.exchange`. They wait as long as another process works, where a collective on the devices would time out.
- Signs of life. The system closes the connection of a killed process at once, and heartbeats tell of a machine that went
  silent, so that all processes end within seconds. JAX's coordination service notices later, and ends the process with a
  stack trace that names nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Sequence

from kwjax.errors import KwjaxError

GONE_STATUS = 3
"""Exit status of a process that ends because another one is gone."""

_BEAT_SECONDS = 5.0
_SILENCE_SECONDS = 40.0
_GRACE_SECONDS = 5.0
_CONNECT_SECONDS = 30.0
_READ_BYTES = 1 << 16
_NOWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))  # addresses kept for documentation


def listen() -> tuple[socket.socket, tuple[int, str]]:
  """The listening socket of process 0, with the port and the password for the others."""
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)
  return listener, (listener.getsockname()[1], secrets.token_hex(16))


def accept(listener: socket.socket, token: str, count: int) -> dict[int, socket.socket]:
  """Connections of all other processes, by their number.

  Raises:
    KwjaxError: a process did not connect.
  """
  found: dict[int, socket.socket] = {}
  deadline = time.monotonic() + _CONNECT_SECONDS
  with listener:
    while len(found) < count - 1:
      listener.settimeout(max(deadline - time.monotonic(), 0.01))
      try:
        connection, _ = listener.accept()
        connection.settimeout(_CONNECT_SECONDS)
        word, _, number = connection.makefile().readline().strip().partition(" ")
      except OSError as error:
        absent = sorted(set(range(1, count)) - set(found))
        raise KwjaxError(f"the processes {absent} of {count} did not connect to process 0: {error}") from error
      if secrets.compare_digest(word, token) and number.isdecimal():
        found[int(number)] = connection
      else:
        connection.close()  # not a process of this run
  return found


def own_hosts() -> list[str]:
  """Names and addresses under which other machines may reach this one, the likeliest first."""
  found = []
  for family, address in _NOWHERE:
    # Connecting a UDP socket sends nothing; it only picks the interface that leads out.
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
      probe.connect((address, 9))
      found.append(str(probe.getsockname()[0]))
  return [*found, socket.gethostname()]


def connect(hosts: Sequence[str], port: int, token: str, index: int) -> dict[int, socket.socket]:
  """Connection of this process to process 0.

  Args:
    hosts: names and addresses of process 0's machine; the first that answers is used.
    port: of process 0's listening socket.
    token: its password.
    index: number of this process.

  Raises:
    KwjaxError: it cannot be reached.
  """
  failures = []
  for host in hosts:
    try:
      connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS / len(hosts))
      connection.sendall(f"{token} {index}\n".encode())
      return {0: connection}
    except OSError as error:
      failures.append(f"{host}:{port}: {error}")
  raise KwjaxError(f"process {index} cannot reach process 0 at {'; '.join(failures)}")


class Watch:
  """A thread that listens to the other processes. Invariant: this process ends soon after another one is gone."""

  def __init__(self, index: int, count: int, peers: dict[int, socket.socket]) -> None:
    """Start the thread.

    Args:
      index: this process.
      count: number of processes.
      peers: connections, by process: all others in process 0, process 0 elsewhere.
    """
    self._index, self._count, self._peers = index, count, peers
    self._stop, self._leaving = threading.Event(), threading.Event()
    self._send_lock = threading.Lock()
    self._rounds = 0
    self._arrived = threading.Condition()
    self._values: dict[int, dict[int, str]] = {}  # in process 0: round -> process -> its value
    self._results: dict[int, list[str]] = {}  # elsewhere: round -> the values of all
    for connection in peers.values():
      connection.settimeout(_BEAT_SECONDS)
    threading.Thread(target=self._listen, name="kwjax-watch", daemon=True).start()

  def exchange(self, value: str) -> list[str]:
    """The values of all processes, in their order; returns when all have called it as often as this one.

    Args:
      value: one line of text.
    """
    self._rounds += 1
    if self._index:
      self._send(f"value {self._rounds} {value}")
      with self._arrived:
        self._arrived.wait_for(lambda: self._rounds in self._results)
        return self._results.pop(self._rounds)
    self._keep(self._rounds, 0, value)
    with self._arrived:
      self._arrived.wait_for(lambda: len(self._values[self._rounds]) == self._count)
      found = self._values.pop(self._rounds)
    values = [found[process] for process in range(self._count)]
    self._send(f"values {self._rounds} {json.dumps(values)}")
    return values

  def _keep(self, number: int, process: int, value: str) -> None:
    with self._arrived:
      self._values.setdefault(number, {})[process] = value
      self._arrived.notify_all()

  @property
  def stop_announced(self) -> bool:
    """Whether some process has announced that it was asked to stop."""
    return self._stop.is_set()

  def announce_stop(self) -> None:
    """Tell all others that this process was asked to stop."""
    if not self._stop.is_set():
      self._stop.set()
      self._send("stop")

  def say_goodbye(self) -> None:
    """Tell the others that this process is done, so that its end is no failure."""
    self._leaving.set()
    self._send("bye")

  def say_failed(self) -> None:
    """Tell the others that this process ends with an error."""
    self._leaving.set()
    self._send(f"failed {self._index}")
    deadline = time.monotonic() + self._last_seconds
    while self._peers and time.monotonic() < deadline:
      time.sleep(0.05)

  @property
  def _last_seconds(self) -> float:
    """How long process 0 waits for the others to read its last message; JAX's service, which it hosts, would end them."""
    return _GRACE_SECONDS + 3.0 if self._index == 0 else 0.0

  def _drain(self, deadline: float) -> None:
    """Wait until the others have closed their connections."""
    for connection in self._peers.values():
      with contextlib.suppress(OSError):
        while (left := deadline - time.monotonic()) > 0:
          connection.settimeout(left)
          if not connection.recv(4096):
            break

  def _send(self, text: str, *, but: int | None = None) -> None:
    with self._send_lock:
      for peer, connection in list(self._peers.items()):
        if peer != but:
          # The listening thread finds a peer that cannot be reached.
          with contextlib.suppress(OSError):
            try:
              connection.sendall(f"{text}\n".encode())
            except TimeoutError:
              connection.shutdown(socket.SHUT_RDWR)  # half a line was sent: no other may follow it

  def _listen(self) -> None:
    heard = dict.fromkeys(self._peers, time.monotonic())
    partial = dict.fromkeys(self._peers, "")
    beat = before = time.monotonic()
    with selectors.DefaultSelector() as selector:
      for peer, connection in self._peers.items():
        selector.register(connection, selectors.EVENT_READ, peer)
      while self._peers:
        for key, _ in selector.select(timeout=_BEAT_SECONDS):
          peer = key.data
          try:
            data = self._peers[peer].recv(_READ_BYTES).decode(errors="replace")
          except OSError:
            data = ""
          heard[peer] = time.monotonic()
          *lines, partial[peer] = (partial[peer] + data).split("\n")
          done = [self._handle(peer, line) for line in lines]  # each line, also those before a goodbye
          if not data or any(done):
            selector.unregister(self._peers[peer])
            del self._peers[peer]
            if not any(done) and not self._leaving.is_set():
              self._end(peer, "gone")
        if time.monotonic() - beat >= _BEAT_SECONDS:
          beat = time.monotonic()
          self._send("beat")
        before, paused = time.monotonic(), time.monotonic() - before > 3 * _BEAT_SECONDS
        if paused:
          # This process was suspended, and perhaps all were, so no silence counts.
          heard = dict.fromkeys(heard, before)
        for peer in [p for p in self._peers if time.monotonic() - heard[p] > _SILENCE_SECONDS]:
          selector.unregister(self._peers[peer])
          del self._peers[peer]
          self._end(peer, "silent")

  def _handle(self, peer: int, line: str) -> bool:
    """Whether the line was the peer's goodbye."""
    word, _, rest = line.partition(" ")
    number, _, text = rest.partition(" ")
    if word == "value":
      self._keep(int(number), peer, text)
    elif word == "values":
      with self._arrived:
        self._results[int(number)] = json.loads(text)
        self._arrived.notify_all()
    elif word == "stop":
      self._stop.set()
      if self._index == 0:
        self._send("stop", but=peer)
    elif word in ("failed", "gone", "silent"):
      self._end(int(number), word)
    return word == "bye"

  def _end(self, lost: int, how: str) -> None:
    """End this process, which would otherwise wait for the lost one forever."""
    if self._index == 0:
      self._send(f"{how} {lost}", but=lost)
    if how == "failed":
      # All processes may have the same error; then each should report it.
      self._leaving.wait(_GRACE_SECONDS)
    if self._leaving.is_set():
      return
    what = {"gone": "is gone", "silent": "no longer answers", "failed": "has stopped with an error (see its output)"}[
      how
    ]
    text = f"\nerror: process {lost} of {self._count} {what}; start all again with the same command to resume\n"
    os.write(2, text.encode())
    self._drain(time.monotonic() + self._last_seconds)
    os._exit(GONE_STATUS)
