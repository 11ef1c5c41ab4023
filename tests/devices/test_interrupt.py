"""Signals: the first asks, the second ends, also while Python is away."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from rspo_jax.devices.interrupt import Interrupt

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(code: str) -> subprocess.Popen:
  child = subprocess.Popen(
    [sys.executable, "-c", code],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )
  line = child.stdout.readline()
  assert line == "ready\n", line + child.stderr.read()
  return child


def wait_until(condition):
  for _ in range(500):
    if condition():
      return
    time.sleep(0.01)
  raise AssertionError("it did not happen within 5 s")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_first_signal_sets_the_flag_and_handlers_come_back(name):
  number = signal.Signals[name]
  told = []
  before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  with Interrupt(notify=lambda *said: told.append(said)) as interrupt:
    assert not interrupt.requested
    assert interrupt.signal_name is None
    assert not interrupt.agreed(0)
    os.kill(os.getpid(), number)
    wait_until(lambda: interrupt.requested and told)
    assert interrupt.signal_name == name
    assert interrupt.agreed(1)
  assert told == [(name, False)]
  after = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  assert after == before
  assert signal.set_wakeup_fd(-1) == -1


def test_it_can_be_entered_again_and_leaks_nothing():
  def open_files():
    return len(os.listdir("/proc/self/fd"))

  before = open_files(), threading.active_count()
  interrupt = Interrupt()
  for _ in range(3):
    with interrupt:
      pass
  assert (open_files(), threading.active_count()) == before


def test_another_thread_may_enter_it_in_vain():
  seen = []

  def run():
    with Interrupt() as interrupt:
      seen.append(interrupt.agreed(0))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [False]


LOOP = """
import time
from rspo_jax.devices.interrupt import Interrupt
with Interrupt() as interrupt:
  print("ready", flush=True)
  while not interrupt.requested:
    time.sleep(0.01)
  print("saving", flush=True)
  time.sleep({saving_s})
print("saved", flush=True)
raise SystemExit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_lets_the_loop_save_and_choose_its_status(number):
  child = start(LOOP.format(saving_s=0.1))
  child.send_signal(number)
  out, err = child.communicate(timeout=10)
  assert (out, err, child.returncode) == ("saving\nsaved\n", "", 75)


@pytest.mark.parametrize(
  ("first", "second", "status"),
  [
    (signal.SIGTERM, signal.SIGTERM, 143),
    (signal.SIGINT, signal.SIGINT, 130),
    (signal.SIGTERM, signal.SIGINT, 130),
  ],
)
def test_a_second_signal_ends_the_process_at_once(first, second, status):
  child = start(LOOP.format(saving_s=60))
  child.send_signal(first)
  assert child.stdout.readline() == "saving\n"
  time.sleep(0.15)
  start_s = time.monotonic()
  child.send_signal(second)
  out, err = child.communicate(timeout=10)
  assert time.monotonic() - start_s < 2
  assert (out, err, child.returncode) == ("", "", status)


def test_the_same_request_sent_twice_is_one():
  child = start(LOOP.format(saving_s=0.2))
  child.send_signal(signal.SIGTERM)
  child.send_signal(signal.SIGTERM)
  assert child.wait(timeout=10) == 75
  child.communicate()


# As in a compilation, the main thread is in C without the interpreter's lock
# and does not come back: no Python handler can run.
AWAY = """
import ctypes
from rspo_jax.devices.interrupt import Interrupt
libc = ctypes.CDLL(None)
lock = (ctypes.c_byte * 64)()
with Interrupt(lambda name, at_once: print("told", name, flush=True)):
  libc.pthread_mutex_init(lock, None)
  libc.pthread_mutex_lock(lock)
  print("ready", flush=True)
  libc.pthread_mutex_lock(lock)
"""


def test_both_signals_work_while_the_main_thread_is_away():
  child = start(AWAY)
  child.send_signal(signal.SIGTERM)
  assert child.stdout.readline() == "told SIGTERM\n"
  time.sleep(0.15)
  child.send_signal(signal.SIGTERM)
  assert child.wait(timeout=5) == 143
  child.communicate()


# Nothing has happened yet that would have to be saved.
EXPENDABLE = """
import time
from rspo_jax.devices.interrupt import Interrupt
told = lambda name, at_once: print("told", name, at_once, flush=True)
with Interrupt(told) as interrupt:
  with interrupt.expendable():
    print("ready", flush=True)
    time.sleep({first_s})
  print("over", flush=True)
  while not interrupt.requested:
    time.sleep(0.01)
raise SystemExit(3)
"""


def test_where_nothing_would_be_lost_one_signal_ends_the_process_with_75():
  child = start(EXPENDABLE.format(first_s=60))
  child.send_signal(signal.SIGTERM)
  out, err = child.communicate(timeout=5)
  assert (out, err, child.returncode) == ("told SIGTERM True\n", "", 75)


def test_after_that_the_loop_is_asked_again():
  child = start(EXPENDABLE.format(first_s=0))
  assert child.stdout.readline() == "over\n"
  child.send_signal(signal.SIGTERM)
  out, _ = child.communicate(timeout=5)
  assert (out, child.returncode) == ("told SIGTERM False\n", 3)


GRACE = """
import time
from rspo_jax.devices.interrupt import Interrupt
with Interrupt(grace_s=0.3) as interrupt:
  print("ready", flush=True)
  time.sleep({busy_s})
time.sleep(0.5)
raise SystemExit(0)
"""


def test_when_its_time_is_up_a_process_ends_saved_or_not():
  child = start(GRACE.format(busy_s=60))
  start_s = time.monotonic()
  child.send_signal(signal.SIGTERM)
  assert child.wait(timeout=5) == 75
  assert time.monotonic() - start_s > 0.25
  child.communicate()
  # Whoever left the context is done, and has all the time.
  child = start(GRACE.format(busy_s=0.1))
  child.send_signal(signal.SIGTERM)
  assert child.wait(timeout=5) == 0
  child.communicate()
