"""Worker processes: every way a call can go wrong costs that call alone."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from rspo_jax.devices import workers
from rspo_jax.devices.workers import (
  FunctionError,
  Limits,
  Workers,
  WorkersError,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What the workers call; imported there only.
SOURCE = """
import os, signal, subprocess, sys, time

def double(x): return 2 * x
def length(x): return len(x)
def pid(): return os.getpid()
def sleep(seconds): time.sleep(seconds); return os.getpid()
def spin():
  while True: pass
def catching_spin():
  while True:
    try:
      while True: pass
    except Exception: pass
def in_one_operation(): return len(str(9**9**9))
def die(number): os.kill(os.getpid(), number)
def leave(): os._exit(3)
def ask_to_leave(): sys.exit(4)
def eat(): return len(bytearray(8 << 30))
def nest(): return nest()
def talk():
  print("hello", flush=True); os.write(1, b"{}\\n"); return sys.stdin.read()
def fail(text): raise ValueError(text)
def give(what):
  return {"set": {1}, "nan": float("nan"), "long": "x" * (2 << 20),
          "text": "\\ud800\\x00\\n", "huge": 10**5000}[what]
def numpy_number():
  import numpy
  return {"a": numpy.float32(0.5)}
def child():
  return subprocess.Popen(["sleep", "300"]).pid
def child_and_hang():
  print(child(), file=open(os.environ["CHILD_FILE"], "w"), flush=True)
  time.sleep(300)
def any_of(name, *arguments): return globals()[name](*arguments)
value = 7
"""


@pytest.fixture(scope="module", autouse=True)
def functions(tmp_path_factory):
  """A module of functions on the path of this process and its workers."""
  folder = tmp_path_factory.mktemp("functions")
  (folder / "worked.py").write_text(SOURCE)
  (folder / "broken.py").write_text("1 / 0\n")
  sys.path.insert(0, str(folder))
  yield folder
  sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pool():
  """Two workers that call any function, a second at most."""
  pool = Workers("worked:any_of", 2, Limits(time_s=1.0))
  yield pool
  pool.close()


def call(pool, *arguments):
  (outcome,) = pool.map([arguments])
  return outcome


def gone(process, seconds=10.0):
  """Whether a process ends within some seconds; zombies have ended."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    try:
      status = pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:
      return True
    if status.rpartition(")")[2].split()[0] == "Z":
      return True
    time.sleep(0.02)
  return False


def test_results_come_in_the_order_of_the_calls(pool):
  outcomes = pool.map([("double", i) for i in range(300)])
  assert [o.value for o in outcomes] == [2 * i for i in range(300)]
  assert not any(o.reason for o in outcomes)
  assert pool.map([]) == []


def test_long_arguments_and_any_text_cross_the_pipes(pool):
  text = "\ud800\x00\n\u2028é" * 100_000
  assert call(pool, "length", text).value == len(text)
  assert len(call(pool, "fail", text).reason) == 200
  assert call(pool, "double", "\ud800\n").value == "\ud800\n\ud800\n"
  assert call(pool, "give", "text").value == "\ud800\x00\n"


@pytest.mark.parametrize(
  ("arguments", "reason"),
  [
    (("fail", "no"), "ValueError: no"),
    (("missing",), "KeyError: 'missing'"),
    (("double",), "TypeError: double() missing 1"),
    (("nest",), "nested too deeply"),
    (("eat",), "ran out of memory"),
    (("leave",), "the worker ended with status 3"),
    (("ask_to_leave",), "SystemExit: 4"),
    (("die", signal.SIGSEGV), "the worker died of SIGSEGV"),
    (("give", "set"), "returned what JSON cannot say: set"),
    (("give", "long"), "returned more than 1048576 bytes"),
    (("give", "huge"), "returned what JSON cannot say: int"),
  ],
)
def test_a_call_that_goes_wrong_has_a_reason_and_the_next_a_result(
  pool, arguments, reason
):
  bad, good = pool.map([arguments, ("double", 4)])
  assert bad.value is None and bad.reason.startswith(reason), bad
  assert good == workers.Outcome(8, "")


def test_a_hanging_call_is_given_up_and_the_others_are_not(pool):
  started = time.monotonic()
  calls = [("double", 1), ("sleep", 300), ("double", 2), ("double", 3)]
  outcomes = pool.map(calls)
  assert time.monotonic() - started < 30
  assert [o.value for o in outcomes] == [2, None, 4, 6]
  assert outcomes[1].reason == "took longer than 1 s"


def test_one_long_operation_is_given_up(pool):
  assert call(pool, "in_one_operation").reason == "took longer than 1 s"


def test_the_limit_of_processor_time_leaves_the_worker_alive():
  limits = Limits(time_s=60.0, cpu_s=0.1)
  pool = Workers("worked:any_of", 1, limits)
  before = call(pool, "pid").value
  for name in ("spin", "catching_spin"):
    assert call(pool, name).reason == "took longer than 0.1 s"
  # Sleeping costs no processor time.
  assert call(pool, "sleep", 0.3).value == before
  pool.close()


def test_what_a_function_prints_and_reads_does_not_disturb(pool, capfd):
  assert call(pool, "talk") == workers.Outcome("", "")
  captured = capfd.readouterr()
  assert captured.out == ""


def test_numbers_of_numpy_come_back_as_numbers(pool):
  pytest.importorskip("numpy")
  assert call(pool, "numpy_number").value == {"a": 0.5}


def test_a_worker_that_died_between_calls_is_replaced_at_no_cost(pool):
  process = call(pool, "pid").value
  os.kill(process, signal.SIGKILL)
  # All its threads, not only the first; who waits later finds it still.
  os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
  assert all(o.value == 2 for o in pool.map([("double", 1)] * 4))


def test_ctrl_c_does_not_reach_workers(pool):
  process = call(pool, "pid").value
  assert os.getsid(process) != os.getsid(0)
  os.killpg(process, signal.SIGINT)
  assert call(pool, "sleep", 0.1).reason == ""


def test_closing_ends_every_process_and_their_children():
  pool = Workers("worked:any_of", 1)
  process, child = call(pool, "pid").value, call(pool, "child").value
  pool.close()
  assert gone(process) and gone(child)
  with pytest.raises(WorkersError, match="closed"):
    pool.map([("pid",)])


def test_a_hanging_call_takes_its_children_along(tmp_path, monkeypatch):
  monkeypatch.setenv("CHILD_FILE", str(tmp_path / "child"))
  pool = Workers("worked:any_of", 1, Limits(time_s=0.5))
  assert call(pool, "child_and_hang").reason == "took longer than 0.5 s"
  pool.close()
  if (tmp_path / "child").exists():
    assert gone(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize("call_", ["sleep', 300", "spin'", "in_one_operation'"])
def test_no_worker_outlives_a_parent_that_is_killed(call_, functions):
  code = f"""
import sys; sys.path.insert(0, {str(functions)!r})
from rspo_jax.devices.workers import *
import threading, time
pool = Workers("worked:any_of", 1, Limits(time_s=0.5))
print(pool.map([("pid",)])[0].value, flush=True)
threading.Timer(0.3, lambda: print("busy", flush=True)).start()
pool.map([('{call_},)])
"""
  parent = subprocess.Popen(
    [sys.executable, "-c", code],
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  with parent:
    process = int(parent.stdout.readline())
    assert parent.stdout.readline() == "busy\n"
    parent.kill()
  # The last one holds the interpreter: only the kernel's limit ends it.
  assert gone(process, 60.0)


@pytest.mark.parametrize(
  ("target", "message"),
  [
    ("worked", r"'worked' must be module:function"),
    ("worked:", r"must be module:function"),
    ("my file.py:f", r"must be module:function"),
    ("worked:triple", r"worked:triple cannot be imported \(AttributeError"),
    ("worked:value", r"worked:value is a int, not a function"),
    ("broken:f", r"broken:f cannot be imported \(ZeroDivisionError"),
    ("nowhere.at_all:f", r"cannot be imported \(ModuleNotFoundError"),
  ],
)
def test_a_wrong_target_is_told_at_the_start(target, message):
  with pytest.raises(FunctionError, match=message):
    Workers(target).start()


def test_workers_that_never_get_ready_are_an_error(monkeypatch):
  monkeypatch.setattr(workers, "_START_LIMIT_S", 0.0)
  pool = Workers("worked:double", 1)
  with pytest.raises(WorkersError, match="not ready in 0 s, 3 times"):
    pool.map([(1,)])


def test_a_process_that_cannot_be_started_is_an_error(monkeypatch):
  monkeypatch.setattr(sys, "executable", "/nonexistent/python")
  with pytest.raises(WorkersError, match="no worker process can be started"):
    Workers("worked:double").start()


@pytest.mark.parametrize(
  "options",
  [
    {"time_s": 0.0},
    {"time_s": float("inf")},
    {"time_s": float("nan")},
    {"cpu_s": -1.0},
    {"memory_bytes": 1},
  ],
)
def test_impossible_limits_are_refused(options):
  with pytest.raises(ValueError):
    Limits(**options)


def test_arguments_that_json_cannot_say_are_refused(pool):
  with pytest.raises(ValueError, match="worked:any_of must be what JSON"):
    pool.map([("double", {1, 2})])
  with pytest.raises(ValueError, match="count=0"):
    Workers("worked:double", 0)
