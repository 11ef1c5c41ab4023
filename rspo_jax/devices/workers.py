"""Calls a function in worker processes that may hang, crash or eat memory.

For verifiers that cannot be trusted to come back: symbolic comparison, and
rewards that users bring.

1. Each worker is a process (`worker_process`) and a session of its own, so
   that Ctrl-C does not reach it. (A fork would carry JAX's locks along, and a
   spawned `multiprocessing` child runs the caller's script again.)
2. Calls and results cross its pipes as JSON, a line each. Nothing is pickled,
   and what the function prints goes to standard error, not among the results.
3. A call has a limit of wall-clock time, kept from outside by killing the
   worker with all that it started; optionally one of processor time, kept from
   inside, which leaves the worker alive; and one of address space. What exceeds
   them costs that call its result and nothing else: it gets a reason instead,
   and a killed worker is replaced.
4. Workers end with their parent, however that ends: at the end of their input,
   when their parent's id changes, and, should a call hold the interpreter all
   the while, at a limit of processor time that the kernel keeps.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from rspo_jax.devices import worker_process
from rspo_jax.devices.worker_process import FunctionError, check_target

_START_LIMIT_S = 120.0  # imports, on a busy machine
_MAX_STARTS = 3  # in a row, without one that gets ready
_GRACE_S = 0.5  # to end by itself before it is killed
_CHUNK = 1 << 16


class WorkersError(OSError):
  """No worker can be started; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
  """What came of one call.

  Attributes:
    value: what the function returned, as JSON gives it back.
    reason: why there is no value; empty when there is one.
  """

  value: Any = None
  reason: str = ""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one call may use.

  Attributes:
    time_s: wall-clock seconds, after which the worker is killed.
    cpu_s: seconds of processor time, after which the call is broken off and
      the worker goes on; 0: none but `time_s`.
    memory_bytes: address space of the worker.
  """

  time_s: float = 5.0
  cpu_s: float = 0.0
  memory_bytes: int = 2 << 30

  def __post_init__(self):
    if not 0 < self.time_s < math.inf or not 0 <= self.cpu_s < math.inf:
      raise ValueError(
        f"limits of time must be positive numbers of seconds, got"
        f" time_s={self.time_s}, cpu_s={self.cpu_s}."
      )
    if self.memory_bytes < 64 << 20:
      raise ValueError(
        f"memory_bytes={self.memory_bytes} is too little for a Python process;"
        f" use at least {64 << 20}."
      )


class Workers:
  """A few processes that call one function.

  They are started when first needed and live until `close`, the garbage
  collector or the end of the program.

  Args:
    target: `module:function`, imported in the workers only. Its arguments and
      its result must be what JSON can say.
    count: number of processes.
    limits: of one call.
    quiet: throw away what the function prints and warns.
  """

  def __init__(
    self,
    target: str,
    count: int = 2,
    limits: Limits = Limits(),
    quiet: bool = False,
  ):
    check_target(target)
    if count < 1:
      raise ValueError(f"count={count} workers cannot work; use 1 or more.")
    self.target = target
    self.limits = limits
    self._quiet = quiet
    self._slots: list[_Worker | None] = [None] * count
    self._failed_starts = 0
    self._losses = 0  # workers that a call has killed
    self._proven = False  # whether a worker has ever been ready
    self._lock = threading.Lock()
    self.close = weakref.finalize(self, _close, self._slots, os.getpid())

  def start(self) -> None:
    """Waits until a worker is ready, so that mistakes show early.

    Raises:
      FunctionError: the function cannot be imported.
      WorkersError: no worker can be started.
    """
    self._run([])

  def map(self, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
    """Calls the function with each tuple of arguments.

    Args:
      calls: arguments of each call.

    Returns:
      Outcomes in the order of the calls.

    Raises:
      FunctionError: the function cannot be imported.
      WorkersError: no worker can be started.
      ValueError: arguments that JSON cannot say.
    """
    lines = []
    for arguments in calls:
      try:
        lines.append(json.dumps(arguments).encode() + b"\n")
      except (TypeError, ValueError) as error:
        raise ValueError(
          f"arguments of {self.target} must be what JSON can say: {error}."
        ) from error
    return self._run(lines) if lines else []

  def _run(self, lines: list[bytes]) -> list[Outcome]:
    with self._lock:
      if not self.close.alive:
        raise WorkersError(f"the workers of {self.target} are closed.")
      try:
        return _Round(self, lines).run()
      except BaseException:
        # Half a line may be under way in either direction: start afresh.
        _close(self._slots, os.getpid())
        raise

  def _spawn(self) -> "_Worker":
    return _Worker(self.target, self.limits, self._quiet)


@functools.cache
def pool(
  target: str, count: int, limits: Limits, quiet: bool = False
) -> Workers:
  """The workers of a program: the same ones for the same arguments."""
  return Workers(target, count, limits, quiet)


class _Worker:
  """One process, its pipes and the call it is at."""

  def __init__(self, target: str, limits: Limits, quiet: bool):
    environment = os.environ | {
      # The worker finds what its parent finds; the accelerator is taken.
      "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
      "JAX_PLATFORMS": "cpu",
      # Sets have the same order in all of them, and every time.
      "PYTHONHASHSEED": "0",
      "OPENBLAS_NUM_THREADS": "1",
      "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", worker_process.__name__, target]
    command += [repr(limits.time_s), repr(limits.cpu_s)]
    command += [str(limits.memory_bytes), str(os.getpid())]
    try:
      self.process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        bufsize=0,
        env=environment,
        start_new_session=True,
      )
    except OSError as error:
      raise WorkersError(
        f"no worker process can be started ({error}); free memory or processes."
      ) from error
    os.set_blocking(self.process.stdin.fileno(), False)
    os.set_blocking(self.process.stdout.fileno(), False)
    self.ready = False
    self.call: int | None = None  # index of the call it is at
    self.deadline = time.monotonic() + _START_LIMIT_S
    self.unsent = b""
    self.received = b""

  @property
  def idle(self) -> bool:
    return self.ready and self.call is None

  def send(self) -> None:
    """Writes what the pipe takes; a closed one shows when read."""
    try:
      while self.unsent:
        sent = os.write(self.process.stdin.fileno(), self.unsent)
        self.unsent = self.unsent[sent:]
    except BlockingIOError:
      pass
    except BrokenPipeError:
      self.unsent = b""

  def receive(self) -> tuple[list[dict], bool]:
    """(messages that are complete, whether the worker has ended)."""
    ended = False
    while True:
      try:
        chunk = os.read(self.process.stdout.fileno(), _CHUNK)
      except BlockingIOError:
        break
      if not chunk:
        ended = True
        break
      self.received += chunk
    *lines, self.received = self.received.split(b"\n")
    return [json.loads(line) for line in lines], ended

  def kill(self) -> None:
    """Ends the process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()
    self.process.stdin.close()
    self.process.stdout.close()

  def ending(self) -> str:
    """How an ended process ended."""
    try:
      status = self.process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
      return "closed its output"
    if status < 0:
      with contextlib.suppress(ValueError):
        return f"died of {signal.Signals(-status).name}"
    return f"ended with status {status}"


class _Round:
  """The calls of one `map`, dealt to workers as they become free."""

  def __init__(self, pool: Workers, lines: list[bytes]):
    self.pool = pool
    self.slots = pool._slots
    self.lines = lines
    self.waiting = deque(range(len(lines)))
    self.outcomes: list[Outcome | None] = [None] * len(lines)
    self.missing = len(lines)

  def run(self) -> list[Outcome]:
    slots = self.slots
    while True:
      self._staff()
      started = self.lines or any(w and w.ready for w in slots)
      if not self.missing and started:
        if self.pool._losses:
          self._staff()  # they get ready while nobody waits
        return self.outcomes
      with selectors.DefaultSelector() as selector:
        for slot, worker in enumerate(slots):
          if worker is None:
            continue
          selector.register(worker.process.stdout, selectors.EVENT_READ, slot)
          if worker.unsent:
            selector.register(worker.process.stdin, selectors.EVENT_WRITE, slot)
        deadlines = [w.deadline for w in slots if w and not w.idle]
        pause = max(0.0, min(deadlines) - time.monotonic())
        events = selector.select(pause)
      for key, mask in events:
        worker = slots[key.data]
        if worker is None:
          continue
        if mask & selectors.EVENT_WRITE:
          worker.send()
        if mask & selectors.EVENT_READ:
          self._hear(key.data)
      self._enforce()

  def _staff(self) -> None:
    """Fills empty places while there is work for them; hands out calls."""
    # As many as there is work for; all once calls have been seen to kill.
    wanted = min(len(self.slots), max(1, self.missing))
    if self.pool._losses:
      wanted = len(self.slots)
    for slot, worker in enumerate(self.slots):
      if (
        worker is not None and worker.idle and worker.process.poll() is not None
      ):
        worker.kill()  # died between two rounds
        self.slots[slot] = worker = None
      if worker is None and slot < wanted:
        self.slots[slot] = worker = self.pool._spawn()
      if worker is not None and worker.idle and self.waiting:
        worker.call = self.waiting.popleft()
        worker.deadline = time.monotonic() + self.pool.limits.time_s
        worker.unsent = self.lines[worker.call]
        worker.send()

  def _hear(self, slot: int) -> None:
    """Takes a worker's messages, or its end."""
    worker = self.slots[slot]
    messages, ended = worker.receive()
    for message in messages:
      if "fatal" in message:
        # What could be imported before is no mistake in the name.
        error = WorkersError if self.pool._proven else FunctionError
        raise error(message["fatal"])
      if "ready" in message:
        worker.ready = self.pool._proven = True
        self.pool._failed_starts = 0
        continue
      self._finish(worker, Outcome(message.get("value"), message["reason"]))
      if message["last"]:
        ended = True
    if not ended:
      return
    if worker.call is not None:
      self.pool._losses += 1
      self._finish(worker, Outcome(None, f"the worker {worker.ending()}"))
    elif not worker.ready:
      self._failed_start(f"the worker {worker.ending()} before it was ready")
    worker.kill()
    self.slots[slot] = None

  def _enforce(self) -> None:
    """Kills the workers that are past their deadline."""
    now = time.monotonic()
    for slot, worker in enumerate(self.slots):
      if worker is None or worker.idle or now < worker.deadline:
        continue
      worker.kill()
      self.slots[slot] = None
      if worker.ready:
        self.pool._losses += 1
        limit = self.pool.limits.time_s
        self._finish(worker, Outcome(None, f"took longer than {limit:g} s"))
      else:
        self._failed_start(f"a worker was not ready in {_START_LIMIT_S:g} s")

  def _finish(self, worker: _Worker, outcome: Outcome) -> None:
    self.outcomes[worker.call] = outcome
    self.missing -= 1
    worker.call = None
    worker.unsent = b""

  def _failed_start(self, why: str) -> None:
    self.pool._failed_starts += 1
    if self.pool._failed_starts >= _MAX_STARTS:
      raise WorkersError(
        f"{self.pool.target} cannot be called: {why},"
        f" {_MAX_STARTS} times in a row."
      )


def _close(slots: list[_Worker | None], owner: int) -> None:
  """Ends all workers; only the process that started them may."""
  if os.getpid() != owner:
    return
  for slot, worker in enumerate(slots):
    if worker is not None:
      worker.kill()
      slots[slot] = None
