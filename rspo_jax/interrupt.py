"""Turns SIGTERM and SIGINT into a request to save and stop.

The first signal sets a flag that the loop reads between its stages; the second
ends the process at once. Python runs a handler only when the main thread gets
back to the interpreter, which a compilation or a long device computation can
put off for minutes. So the bytes that Python's C handler writes for every
signal (`signal.set_wakeup_fd`) are read by a thread of our own, which sets the
flag and ends the process without the main thread's help.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Some launchers signal both the process and its group: the same request twice.
_SAME_REQUEST_S = 0.1


class Interrupt:
  """Context in which the first signal asks and the second ends.

  Outside the main thread, where Python allows no handlers, it never asks.
  Enter it after `jax.distributed.initialize`, whose pre-emption service takes
  SIGTERM for itself.
  """

  def __init__(self, notify: Callable[[str], Any] | None = None):
    """Prepares.

    Args:
      notify: called once, from another thread, with the signal's name; for a
        message that should not wait for the end of a long stage.
    """
    self._notify = notify
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
    while data := reader.recv(64):
      for number in data:
        if number in _SIGNALS:
          self._count(number)

  def _count(self, number: int) -> None:
    now = time.monotonic()
    if not self._told:
      self._told = True
      self._first_s = now
      name = signal.Signals(number).name
      self._name = self._name or name
      if self._notify is not None:
        self._notify(name)
    elif now - self._first_s >= _SAME_REQUEST_S:
      _end(number)


def _end(number: int) -> None:
  """Leaves at once; a save under way is one that never counted."""
  if sys.stdout is not None and sys.stdout.isatty():
    # A live progress line hides the cursor.
    os.write(1, b"\x1b[?25h\n")
  os._exit(128 + number)
