"""Profiles: own times by brute force, a trace of a real program."""

import os
import subprocess
import sys

import numpy as np
import pytest

from rspo_jax.reporting import profiler


def test_own_times_are_those_of_a_count_of_every_tick():
  rng = np.random.default_rng(0)
  events, free = [], [(0, 1000, 0)]
  while free:  # nested intervals at random
    low, high, depth = free.pop()
    at = low
    while depth < 5 and at < high:
      start = at + int(rng.integers(0, 20))
      end = start + int(rng.integers(1, max(2, (high - low) // 2)))
      if end > high:
        break
      events.append((start, end - start, len(events)))
      free.append((start, end, depth + 1))
      at = end
  owner = np.full(1000, -1)
  for start, duration, key in sorted(events, key=lambda e: -e[1]):
    # Of equally long ones at one place the later is the inner one.
    owner[start : start + duration] = key
  wanted = {key: int((owner == key).sum()) for _, _, key in events}
  found = dict(profiler.own_times(rng.permutation(events).tolist()))
  same_span = {(s, d) for s, d, _ in events}
  if len(same_span) == len(events):
    assert found == wanted
  assert sum(found.values()) == int((owner >= 0).sum())


def test_operations_of_a_kind_are_one_row():
  assert profiler.kind("%dot.12") == profiler.kind("dot.7.clone") == "dot"
  assert profiler.kind("wrapped_exp") == "wrapped_exp"
  seconds = {("update", f"op{i}"): 1.0 + i for i in range(30)}
  rows = profiler.table(seconds, 2)
  assert len(rows) == profiler.TOP + 1
  assert rows[0]["operation"] == "op29"
  assert rows[0]["ms a step"] == "15000.00"
  assert rows[-1]["operation"] == "20 others"


_TRACE = """
import pathlib, sys
import jax, jax.numpy as jnp
from rspo_jax.reporting import profiler

@jax.jit
def grow(x):
  return jax.lax.fori_loop(0, 4, lambda i, x: jnp.tanh(x @ x) / 9, x)

x = jnp.ones((200, 200))
told, warned, traced = [], [], []
profile = profiler.Profiler(
  pathlib.Path(sys.argv[1]), 2, lambda *table: told.append(table), warned.append
)
for _ in range(5):
  with profile.step():
    traced.append(profile._tracing)
    jax.block_until_ready(grow(x))
profile.close()
"""


def _in_new_process(script, folder):
  """Runs a script in a process that has loaded nothing else."""
  ran = subprocess.run(
    [sys.executable, "-c", script, str(folder)],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert ran.returncode == 0, ran.stderr


def test_a_trace_of_some_steps_names_program_and_operation(tmp_path):
  _in_new_process(
    _TRACE
    + """
assert traced == [False, True, True, False, False], traced
assert warned == [], warned
((rows, title),) = told
assert title.startswith("costs of 2 steps"), title
assert {"grow"} <= {row["program"] for row in rows}, rows
assert list(pathlib.Path(sys.argv[1]).rglob("*.xplane.pb"))
""",
    tmp_path / "profile",
  )


def test_where_libtpu_is_loaded_without_a_tpu_the_run_goes_on(tmp_path):
  pytest.importorskip("libtpu")
  _in_new_process(
    """
from rspo_jax.planning import chips, compiler
compiler.topology_devices(chips.parse("v5e:2x2"))
"""
    + _TRACE
    + """
assert traced == [False] * 5 and told == [], (traced, told)
(warning,) = warned
assert "run.profile=2" in warning and "JAX_PLATFORMS" in warning, warning
""",
    tmp_path / "profile",
  )


def test_without_steps_nothing_is_traced(tmp_path):
  profile = profiler.Profiler(tmp_path / "profile", 0, pytest.fail, pytest.fail)
  for _ in range(3):
    with profile.step():
      assert not profile._tracing
  profile.close()
  assert not (tmp_path / "profile").exists()
  with pytest.raises(ValueError, match="no trace"):
    profiler.costs(tmp_path, 1)
