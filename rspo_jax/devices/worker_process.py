"""What runs in a worker process: answers calls on standard input (`workers`).

python -m rspo_jax.devices.worker_process MODULE:FUNCTION TIME CPU MEMORY PARENT
"""

import importlib
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

_MAX_RESULT_BYTES = 1 << 20
_MAX_REASON = 200  # characters


class FunctionError(ValueError):
  """The function to call cannot be imported: the caller's mistake."""


def check_target(target: str) -> tuple[str, str]:
  """Splits `module:function`.

  Raises:
    FunctionError: it is not of that form.
  """
  module, colon, function = target.partition(":")
  names = [*module.split("."), *function.split(".")]
  if not colon or not all(name.isidentifier() for name in names):
    raise FunctionError(
      f"{target!r} must be module:function, such as my_rewards:score for the"
      " function score in my_rewards.py."
    )
  return module, function


class _OutOfTime(BaseException):
  """The processor time of a call is used up.

  Not an Exception: libraries that catch those would go on.
  """


def _break_off(*_) -> None:
  raise _OutOfTime


def _end_with_parent(parent: int) -> None:
  """Ends this session when the parent is gone."""
  while os.getppid() == parent:
    time.sleep(0.5)
  _end_session()


def _end_session() -> None:
  """Ends this process and whatever it has started."""
  if os.getpgrp() == os.getpid():
    os.killpg(0, signal.SIGKILL)
  os._exit(0)


def _import(target: str):
  """The function to call.

  Raises:
    FunctionError: there is none; the message says why.
  """
  module_name, name = check_target(target)
  try:
    found = importlib.import_module(module_name)
    for part in name.split("."):
      found = getattr(found, part)
  except Exception as error:  # the module is a program of the caller's
    raise FunctionError(
      f"{target} cannot be imported ({type(error).__name__}: {error}); it must"
      " name a function in a module on Python's path."
    ) from error
  if not callable(found):
    raise FunctionError(
      f"{target} is a {type(found).__name__}, not a function."
    )
  return found


def _answer(function, line: bytes, cpu_s: float) -> dict[str, Any]:
  """Calls the function once and says what came of it."""
  value, reason, last = None, "", False
  try:
    if cpu_s:
      signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
      value = function(*json.loads(line))
    finally:
      signal.setitimer(signal.ITIMER_PROF, 0)
  except _OutOfTime:
    reason = f"took longer than {cpu_s:g} s"
  except MemoryError:
    # What is left of the address space may be too little for the next call.
    reason, last = "ran out of memory", True
  except RecursionError:
    reason = "nested too deeply"
  except (Exception, SystemExit) as error:
    reason = f"{type(error).__name__}: {error}"[:_MAX_REASON]
  return {"value": value, "reason": reason, "last": last}


def _plain(value):
  """A number of numpy, torch or jax as Python's own."""
  if hasattr(value, "item"):
    return value.item()
  raise TypeError(type(value).__name__)


def _encode(message: dict[str, Any]) -> bytes:
  """A message as a line; a result that JSON cannot say becomes a reason."""
  why = f"returned more than {_MAX_RESULT_BYTES} bytes"
  try:
    line = json.dumps(message, default=_plain).encode() + b"\n"
    if len(line) <= _MAX_RESULT_BYTES:
      return line
  except (TypeError, ValueError, RecursionError):
    why = f"returned what JSON cannot say: {type(message['value']).__name__}"
  return _encode({"value": None, "reason": why, "last": message["last"]})


def _write(descriptor: int, content: bytes) -> None:
  while content:
    content = content[os.write(descriptor, content) :]


def serve(
  target: str, time_s: float, cpu_s: float, memory_bytes: int, parent: int
) -> None:
  """Answers calls on standard input until it ends.

  Args:
    target: `module:function`.
    time_s: limit of a call, kept by the parent.
    cpu_s: limit of its processor time, kept here; 0: none.
    memory_bytes: limit of the address space.
    parent: process id.
  """
  threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
  requests = os.fdopen(os.dup(0), "rb")
  replies = os.dup(1)
  # The function gets an empty input, and prints where it does not disturb.
  with open(os.devnull, "rb") as nothing:
    os.dup2(nothing.fileno(), 0)
  os.dup2(2, 1)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGPROF, _break_off)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  if hard != resource.RLIM_INFINITY:
    memory_bytes = min(memory_bytes, hard)
  resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, hard))
  try:
    function = _import(target)
  except FunctionError as error:
    _write(replies, json.dumps({"fatal": str(error)}).encode() + b"\n")
    return
  _write(replies, b'{"ready": true}\n')
  _, hard = resource.getrlimit(resource.RLIMIT_CPU)
  burst = math.ceil(time_s * (os.cpu_count() or 1)) + 1
  for line in requests:
    if hard == resource.RLIM_INFINITY:
      used = math.ceil(time.process_time())
      resource.setrlimit(resource.RLIMIT_CPU, (used + burst, hard))
    message = _answer(function, line, cpu_s)
    _write(replies, _encode(message))
    if message["last"]:
      return


if __name__ == "__main__":
  try:
    kinds = (str, float, float, int, int)
    serve(*(kind(word) for kind, word in zip(kinds, sys.argv[1:], strict=True)))
  except BrokenPipeError:
    pass  # the parent is gone
  finally:
    _end_session()
