"""Turns SIGTERM and SIGINT into a request to save and stop.

The first signal sets a flag that the loop reads between its stages; the second
ends the process at once. Python runs a handler only when the main thread gets
back to the interpreter, which a compilation or a long device computation can
put off for minutes. So the bytes that Python's C handler writes for every
signal (`signal.set_wakeup_fd`) are read by a thread of our own, which sets the
flag and ends the process without the main thread's help.

Two more ways out need no second signal: inside `expendable`, where nothing
would be lost, the first one ends the process; and `grace_s` after the first
one it ends whether the loop has saved or not (a kill would come next).
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Some launchers signal both the process and its group: the same request twice.
_SAME_REQUEST_S = 0.1
_INTERRUPTED = 75


class Interrupt:
  """Context in which the first signal asks and the second ends.

  Outside the main thread, where Python allows no handlers, it never asks.
  Enter it after `jax.distributed.initialize`, whose pre-emption service takes
  SIGTERM for itself.
  """

  def __init__(
    self,
    notify: Callable[[str, bool], Any] | None = None,
    grace_s: float = 0.0,
  ):
    """Prepares.

    Args:
      notify: called once, from another thread, with the signal's name and
        whether the process ends at once; for a message that should not wait
        for the end of a long stage.
      grace_s: seconds from the first signal to the end of the process with
        status 75, unless the context was left before; 0: no limit.
    """
    self._notify = notify
    self._grace_s = grace_s
    self._expendable = False
    self._name: str | None = None
    self._first_s = 0.0
    self._told = False
    self._old_handlers: dict[int, Any] = {}
    self._old_wakeup_fd = -1
    self._ends: tuple[socket.socket, socket.socket] | None = None
    self._thread: threading.Thread | None = None

  @property
  def requested(self) -> bool:
    """Whether this process was asked to stop."""
    return self._name is not None

  @property
  def signal_name(self) -> str | None:
    """Name of the first signal, such as "SIGTERM"."""
    return self._name

  @contextlib.contextmanager
  def expendable(self) -> Iterator[None]:
    """Inside, a first signal ends the process at once with status 75.

    For a compilation before anything has happened that is not on disk.
    """
    self._expendable = True
    try:
      yield
    finally:
      self._expendable = False

  def agreed(self, step: int) -> bool:
    """Whether any process was asked to stop; the same answer for all.

    Args:
      step: step that the caller is about to begin; all processes call this
        for the same steps.

    Raises:
      RuntimeError: processes asked about different steps.
    """
    import jax

    if jax.process_count() == 1:
      return self.requested
    import numpy as np
    from jax.experimental import multihost_utils

    mine = np.array([self.requested, step], np.int32)
    everyone = multihost_utils.process_allgather(mine)  # [process, 2]
    if (everyone[:, 1] != step).any():
      raise RuntimeError(
        f"Processes are at different steps {everyone[:, 1].tolist()}: start "
        "all of them with the same command and workdir."
      )
    return bool(everyone[:, 0].any())

  def __enter__(self) -> "Interrupt":
    if threading.current_thread() is not threading.main_thread():
      return self
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    self._ends = reader, writer
    self._thread = threading.Thread(
      target=self._watch, args=(reader,), name="interrupt", daemon=True
    )
    self._thread.start()
    self._old_wakeup_fd = signal.set_wakeup_fd(
      writer.fileno(), warn_on_full_buffer=False
    )
    for number in _SIGNALS:
      self._old_handlers[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_) -> None:
    if self._ends is None:
      return
    for number, handler in self._old_handlers.items():
      # None: it was installed from C and cannot be put back by Python.
      if handler is not None:
        signal.signal(number, handler)
    self._old_handlers.clear()
    signal.set_wakeup_fd(self._old_wakeup_fd)
    reader, writer = self._ends
    self._ends = None
    writer.close()
    self._thread.join()
    reader.close()

  def _handle(self, number: int, _frame: Any) -> None:
    """Sets the flag in case another library took the wake-up descriptor."""
    if self._name is None:
      self._name = signal.Signals(number).name

  def _watch(self, reader: socket.socket) -> None:
    """Counts signals as they arrive, until the other end is closed."""
    while True:
      if self._told and self._grace_s:
        left_s = self._first_s + self._grace_s - time.monotonic()
        reader.settimeout(max(left_s, 1e-3))
      try:
        data = reader.recv(64)
      except TimeoutError:
        _end(_INTERRUPTED)
      if not data:
        return
      for number in data:
        if number in _SIGNALS:
          self._count(number)

  def _count(self, number: int) -> None:
    now = time.monotonic()
    if not self._told:
      self._told = True
      self._first_s = now
      name = signal.Signals(number).name
      at_once = self._expendable
      self._name = self._name or name
      if self._notify is not None:
        self._notify(name, at_once)
      if at_once:
        _end(_INTERRUPTED)
    elif now - self._first_s >= _SAME_REQUEST_S:
      _end(128 + number)


def _end(status: int) -> None:
  """Leaves at once; a save under way is one that never counted."""
  if sys.stdout is not None and sys.stdout.isatty():
    # A live progress line hides the cursor.
    os.write(1, b"\x1b[?25h\n")
  os._exit(status)
