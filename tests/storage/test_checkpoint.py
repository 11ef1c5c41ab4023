"""Checkpoints: exact, damage found, earlier ones never harmed."""

import errno
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tiny_runs
from flax import struct
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rspo_jax.storage import commits, files
from rspo_jax.storage.checkpoint import Checkpointer, CheckpointError

ROOT = pathlib.Path(__file__).resolve().parents[2]


@struct.dataclass
class State:
  step: jax.Array
  params: dict
  moments: tuple
  nothing: None = None


def make_state(step: int) -> State:
  """A state that follows from the step, with every awkward kind of leaf."""
  rng = np.random.default_rng(step)
  bits = rng.integers(0, 2**32, (33, 5), np.uint32)  # NaNs and infinities too
  params = {
    "kernel": jnp.asarray(rng.normal(size=(16, 24)).astype(np.float32)),
    "any_bits": jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.float32),
    "half": jnp.asarray(rng.normal(size=(7, 3)), jnp.bfloat16),
    "ids": jnp.asarray(rng.integers(-(2**31), 2**31, 9), jnp.int32),
    "flags": jnp.asarray(rng.integers(0, 2, 11).astype(bool)),
    "bytes": jnp.asarray(rng.integers(0, 256, 13), jnp.uint8),
    "no_elements": jnp.zeros((0, 4), jnp.bfloat16),
    "no_leaves": {},
    "a/b c": jnp.float32(-0.0),
  }
  moments = optax.adamw(1e-3).init({"kernel": params["kernel"]})
  return State(jnp.int32(step), params, moments)


def assert_same_bits(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for leaf, other in zip(
    jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True
  ):
    leaf, other = np.asarray(leaf), np.asarray(other)
    assert (leaf.dtype, leaf.shape) == (other.dtype, other.shape)
    assert leaf.tobytes() == other.tobytes()


def files_of(folder) -> list[pathlib.Path]:
  return sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())


@pytest.fixture
def saved(tmp_path):
  """A folder with the steps 3 and 7."""
  folder = tmp_path / "checkpoints"
  with Checkpointer(folder) as keeper:
    for step in (3, 7):
      keeper.save(step, make_state(step), {"epoch": step})
  return folder


@pytest.fixture
def no_room(monkeypatch):
  """A disk that is full when the record is to be written."""

  def refuse(path, content):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))

  monkeypatch.setattr(files, "write", refuse)


# --- exactness ---


@pytest.mark.parametrize(
  "template",
  [
    lambda: make_state(0),
    lambda: jax.eval_shape(lambda: make_state(0)),
    lambda: lambda extra: make_state(extra["epoch"]),
  ],
  ids=["arrays", "shapes", "a function of what was saved beside it"],
)
def test_every_bit_comes_back(saved, template):
  with Checkpointer(saved) as keeper:
    restored = keeper.restore(template())
  assert restored.step == 7
  assert restored.extra == {"epoch": 7}
  assert restored.messages == []
  assert_same_bits(restored.state, make_state(7))


def test_numpy_leaves_come_back_as_numpy_and_may_change_meanwhile(tmp_path):
  mutable = np.arange(100_000.0)
  narrow = np.arange(7).astype(ml_dtypes.bfloat16)
  with Checkpointer(tmp_path) as keeper:
    keeper.save(1, {"a": mutable, "b": narrow}, {})
    mutable[:] = -1
    restored = keeper.restore({"a": mutable, "b": narrow})
  assert isinstance(restored.state["a"], np.ndarray)
  assert_same_bits(
    restored.state,
    {"a": np.arange(100_000.0), "b": np.arange(7).astype(ml_dtypes.bfloat16)},
  )


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  update = jax.jit(
    lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0
  )
  state = {f"w{i}": jnp.full((256, 256), i, jnp.float32) for i in range(8)}
  with Checkpointer(tmp_path, keep_last=5) as keeper:
    for step in range(5):
      keeper.save(step, state, {})
      for _ in range(3):
        state = update(state)
    for step in range(5):
      restored = keeper.restore(state, step=step)
      expected = {
        f"w{i}": np.full((256, 256), i + 3 * step, np.float32) for i in range(8)
      }
      assert_same_bits(restored.state, expected)


def test_a_state_without_elements_is_a_state(tmp_path):
  state = {"empty": jnp.zeros((0,)), "none": None}
  with Checkpointer(tmp_path) as keeper:
    keeper.save(0, state, {"only": "this"})
    restored = keeper.restore(state)
  assert restored.extra == {"only": "this"}
  assert_same_bits(restored.state, state)


def test_an_empty_or_absent_folder_holds_nothing(tmp_path):
  with Checkpointer(tmp_path / "absent") as keeper:
    assert keeper.restore(make_state(0)) is None
    assert keeper.steps() == []
  assert not (tmp_path / "absent").exists()


# --- damage ---


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, pathlib.Path.unlink])
def test_damage_to_any_file_brings_the_step_before_back(saved, damage, capfd):
  newest = saved / "step_00000007"
  whole = saved.parent / "whole"
  shutil.copytree(newest, whole)
  names = [p.relative_to(newest) for p in files_of(newest)]
  # The shards, Orbax's indices and our own record.
  assert len(names) >= 6
  damaged_names = []
  for name in names:
    if not (newest / name).stat().st_size:
      continue
    damage(newest / name)
    damaged_names.append(name)
    with Checkpointer(saved) as keeper:
      restored = keeper.restore(make_state(0))
    assert restored.step == 3, name
    assert_same_bits(restored.state, make_state(3))
    if not (newest / "commit.json").exists():
      assert restored.messages == []  # as if the save had been cut short
    else:
      (message,) = restored.messages
      assert str(newest) in message
      assert str(name) in message
    shutil.rmtree(newest)
    shutil.copytree(whole, newest)
  assert len(damaged_names) >= 6
  assert capfd.readouterr() == ("", "")


def test_no_change_of_bytes_goes_unnoticed(tmp_path):
  folder = tmp_path / "checkpoints"
  with Checkpointer(folder) as keeper:
    for step in (1, 2):
      keeper.save(step, make_state(step), {})
  newest = folder / "step_00000002"
  whole_by_path = {p: p.read_bytes() for p in files_of(newest)}
  paths = [p for p, whole in whole_by_path.items() if whole]

  @settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
  )
  @given(st.data())
  def check(data):
    path = data.draw(st.sampled_from(paths))
    whole = whole_by_path[path]
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 64)))
    patch = data.draw(st.binary(max_size=64))
    changed = whole[:start] + patch + whole[end:]
    path.write_bytes(changed)
    try:
      with Checkpointer(folder) as keeper:
        restored = keeper.restore(make_state(0))
    finally:
      path.write_bytes(whole)
    assert restored.step == (2 if changed == whole else 1)
    assert_same_bits(restored.state, make_state(restored.step))

  check()


def test_when_all_are_damaged_it_says_so_instead_of_starting_afresh(saved):
  for step in (3, 7):
    flip(files_of(saved / f"step_{step:08d}" / "state")[0])
  with (
    Checkpointer(saved) as keeper,
    pytest.raises(CheckpointError, match=r"step_00000007.*\n.*step_00000003"),
  ):
    keeper.restore(make_state(0))


def test_a_save_that_was_cut_short_does_not_count(saved):
  shutil.copytree(saved / "step_00000007", saved / "step_00000011")
  (saved / "step_00000011" / "commit.json").unlink()
  (saved / "step_00000015").mkdir()
  (saved / "notes.txt").write_text("not ours")
  with Checkpointer(saved) as keeper:
    assert keeper.steps() == [3, 7]
    restored = keeper.restore(make_state(0))
    assert (restored.step, restored.messages) == (7, [])
    keeper.save(9, make_state(9), {})
    keeper.wait()
    assert keeper.steps() == [7, 9]
  names = sorted(p.name for p in saved.iterdir())
  assert names == ["notes.txt", "step_00000007", "step_00000009"]


def test_a_damaged_step_can_be_saved_again(saved):
  flip(files_of(saved / "step_00000007" / "state")[-1])
  with Checkpointer(saved) as keeper:
    assert keeper.restore(make_state(0)).step == 3
    keeper.save(7, make_state(7), {"again": True})
    keeper.wait()
    restored = keeper.restore(make_state(0))
    assert (restored.step, restored.messages) == (7, [])
    assert restored.extra == {"again": True}
    assert keeper.steps() == [3, 7]
  assert not (saved / "step_00000007").exists()
  assert (saved / "step_00000007.1").exists()


def test_a_record_of_another_step_or_format_is_no_record(saved):
  record = saved / "step_00000007" / "commit.json"
  body = json.loads(record.read_text())["commit"]
  record.write_bytes(commits.seal({**body, "format": 99}))
  with Checkpointer(saved) as keeper:
    restored = keeper.restore(make_state(0))
  assert restored.step == 3
  assert "99" in restored.messages[0]


KILLED = """
import jax.numpy as jnp
from rspo_jax.storage.checkpoint import Checkpointer
state = {{f"w{{i}}": jnp.full((64, 256), i, jnp.int32) for i in range(16)}}
keeper = Checkpointer({folder!r})
restored = keeper.restore(state)
step = restored.step if restored else 0
while True:
  step += 1
  keeper.save(step, {{k: x + step for k, x in state.items()}}, {{"at": step}})
  print(step, flush=True)
"""


def start(code: str, **environment: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(code)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
  )


def test_kill_9_in_a_save_leaves_a_folder_that_goes_on(tmp_path):
  folder = tmp_path / "checkpoints"
  state = {f"w{i}": np.full((64, 256), i, np.int32) for i in range(16)}
  rng = random.Random(5)
  newest = 0
  for _ in range(3):
    child = start(KILLED.format(folder=str(folder)))
    try:
      lines = [child.stdout.readline() for _ in range(3)]
      assert all(lines), child.stderr.read()
      time.sleep(rng.uniform(0, 0.2))
    finally:
      child.kill()
      child.wait()
      child.stdout.close()
      child.stderr.close()
    with Checkpointer(folder) as keeper:
      restored = keeper.restore(state)
    assert restored.messages == []
    # `save` returns when the save before it is on disk.
    assert restored.step >= max(newest, int(lines[-1]) - 1)
    assert restored.extra == {"at": restored.step}
    expected = {k: x + np.int32(restored.step) for k, x in state.items()}
    assert_same_bits(restored.state, expected)
    newest = restored.step


# --- what is kept ---


def test_last_every_and_best_are_kept(tmp_path):
  scores = [0.1, 0.9, 0.2, 0.3, None, 0.8, 0.1, 0.1, 0.2]
  state = {"a": jnp.arange(3)}
  with Checkpointer(tmp_path, keep_last=2, keep_every=4, keep_best=2) as keeper:
    for step, score in enumerate(scores, 1):
      keeper.save(step, state, {}, score)
    keeper.wait()
    # 8, 9: last; 4, 8: every fourth; 2, 6: best.
    assert keeper.steps() == [2, 4, 6, 8, 9]
    assert keeper.restore(state, step=6).step == 6
    assert keeper.restore(state, step=5) is None


def test_steps_of_a_history_that_was_left_are_dropped(saved):
  with Checkpointer(saved) as keeper:
    assert keeper.restore(make_state(0), step=3).step == 3
    keeper.save(4, make_state(4), {})
    keeper.wait()
    assert keeper.steps() == [3, 4]


# --- no room ---


def test_a_full_disk_is_reported_and_harms_nothing(saved, capfd):
  before = {p: p.read_bytes() for p in files_of(saved)}
  state = {"large": jnp.arange(500_000.0)}
  with Checkpointer(saved) as keeper:
    with tiny_runs.full_disk(100_000), pytest.raises(CheckpointError) as caught:
      keeper.save(9, state, {})
      keeper.wait()
    assert str(saved / "step_00000009") in str(caught.value)
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert "Make room" in str(caught.value)
    assert {p: p.read_bytes() for p in files_of(saved)} == before
    # Room again: the same run goes on.
    keeper.save(9, make_state(9), {})
    keeper.wait()
    assert keeper.steps() == [7, 9]
    assert_same_bits(keeper.restore(make_state(0)).state, make_state(9))
  assert capfd.readouterr() == ("", "")


def test_a_disk_that_fills_up_before_the_record_harms_nothing(saved, no_room):
  before = {p: p.read_bytes() for p in files_of(saved)}
  keeper = Checkpointer(saved)
  keeper.save(9, make_state(9), {})
  # The next call says it; the loop may be steps further.
  with pytest.raises(CheckpointError, match="No space left on device"):
    keeper.save(10, make_state(10), {})
  assert {p: p.read_bytes() for p in files_of(saved)} == before
  keeper.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    Checkpointer(tmp_path / "file" / "checkpoints") as keeper,
    pytest.raises(CheckpointError, match=r"file/checkpoints.*writable"),
  ):
    keeper.save(0, make_state(0), {})
    keeper.wait()


def test_an_error_of_the_loop_is_not_hidden_by_one_of_the_save(saved, no_room):
  with pytest.raises(ZeroDivisionError), Checkpointer(saved) as keeper:
    keeper.save(9, make_state(9), {})
    raise ZeroDivisionError


# --- what does not fit ---


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (lambda p: p.pop("half"), "also holds params.half"),
    (lambda p: p.update(extra=jnp.zeros(2)), "lacks params.extra"),
    (lambda p: p.update(half=p["half"].T), r"bfloat16\[7, 3\].*\[3, 7\]"),
    (
      lambda p: p.update(half=p["half"].astype(jnp.float16)),
      r"bfloat16\[7, 3\].*float16",
    ),
    (
      lambda p: p.update(no_elements=jnp.zeros((0, 5))),
      "params.no_elements: saved",
    ),
  ],
)
def test_another_tree_is_refused_by_name(saved, change, named):
  template = make_state(0)
  change(template.params)
  with (
    Checkpointer(saved) as keeper,
    pytest.raises(CheckpointError, match=named),
  ):
    keeper.restore(template)


@pytest.mark.parametrize(
  ("state", "extra", "named"),
  [
    ({"key": jax.random.key(0)}, {}, "typed random key"),
    ({"rate": 0.1}, {}, "rate is a float"),
    ({"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {}, "'a.b'"),
    ({}, {"score": float("nan")}, "JSON"),
    ({}, {"pair": (1, 2)}, "tuples"),
    ({}, {1: 2}, "keys"),
    ({}, {"folder": pathlib.Path()}, "JSON"),
  ],
)
def test_what_would_not_come_back_is_refused(tmp_path, state, extra, named):
  with (
    Checkpointer(tmp_path / "c") as keeper,
    pytest.raises(TypeError, match=named),
  ):
    keeper.save(0, state, extra)
  assert not (tmp_path / "c").exists()


# --- other devices, other processes ---

EIGHT = """
import sys
sys.path[:0] = {tests!r}
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from test_checkpoint import Checkpointer, assert_same_bits, make_state
assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
def spread(leaf):
  spec = P("data", "model") if leaf.shape == (16, 24) else P()
  return jax.ShapeDtypeStruct(
    leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
template = jax.tree.map(spread, make_state(0))
with Checkpointer({one!r}) as keeper:
  state = keeper.restore(template).state
assert_same_bits(state, make_state(7))
kernel = state.params["kernel"]
assert kernel.sharding.spec == P("data", "model"), kernel.sharding
assert kernel.addressable_shards[0].data.shape == (4, 12)
with Checkpointer({eight!r}) as keeper:
  keeper.save(8, state, {{}})
"""


def test_one_device_to_eight_and_back(saved, tmp_path):
  eight = tmp_path / "eight"
  child = start(
    EIGHT.format(
      tests=[str(ROOT / "tests"), str(pathlib.Path(__file__).parent)],
      one=str(saved),
      eight=str(eight),
    ),
    XLA_FLAGS="--xla_force_host_platform_device_count=8",
  )
  _, errors = child.communicate(timeout=120)
  assert child.returncode == 0, errors
  with Checkpointer(eight) as keeper:
    restored = keeper.restore(make_state(0))
  assert restored.step == 8
  assert_same_bits(restored.state, make_state(7))


TWO = """
import os, pathlib, signal
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:{port}", 2, {process})
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from rspo_jax.storage.checkpoint import Checkpointer, CheckpointError
from rspo_jax.devices.interrupt import Interrupt
mesh = Mesh(np.array(jax.devices()), ("data",))
split = NamedSharding(mesh, P("data"))
def make(step):
  rows = np.arange(64, dtype=np.float32).reshape(8, 8) + step
  return {{
    "rows": jax.make_array_from_callback((8, 8), split, lambda i: rows[i]),
    "none": jax.make_array_from_callback(
      (0,), NamedSharding(mesh, P()), lambda i: np.zeros(0)[i]),
  }}
def check(step, messages):
  restored = keeper.restore(jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    make(0)))
  assert restored.step == step, restored
  assert len(restored.messages) == messages, restored.messages
  for mine, other in zip(
    restored.state["rows"].addressable_shards,
    make(step)["rows"].addressable_shards,
  ):
    assert np.array_equal(mine.data, other.data)
folder = pathlib.Path({folder!r})
keeper = Checkpointer(folder)
for step in (1, 2, 3):
  keeper.save(step, make(step), {{"at": step}})
keeper.wait()
check(3, 0)
if {process} == 0:
  shards = folder.glob("step_00000003/state/ocdbt.process_1/d/*")
  shard = max(shards, key=lambda p: p.stat().st_size)
  data = bytearray(shard.read_bytes())
  data[len(data) // 2] ^= 1
  shard.write_bytes(data)
multihost_utils.sync_global_devices("damaged")
check(2, 1)
# A failure in one process is one of both.
if {process} == 0:
  from rspo_jax.storage import files
  whole, files.write = files.write, None
try:
  keeper.save(5, make(5), {{}})
  keeper.wait()
  raise SystemExit("no error")
except CheckpointError as error:
  print(error)
if {process} == 0:
  files.write = whole
keeper.save(6, make(6), {{}})
keeper.close()
with Interrupt() as interrupt:
  assert not interrupt.agreed(6)
  if {process} == 1:
    os.kill(os.getpid(), signal.SIGTERM)
    while not interrupt.requested:
      pass
  assert interrupt.agreed(7)
  assert interrupt.requested == ({process} == 1)
print("fine")
"""


def test_two_processes_save_and_choose_together(tmp_path):
  port = tiny_runs.free_port()
  folder = tmp_path / "checkpoints"
  children = [
    start(TWO.format(port=port, process=i, folder=str(folder)))
    for i in range(2)
  ]
  try:
    results = [child.communicate(timeout=120) for child in children]
  finally:
    for child in children:
      child.kill()
  for (out, err), child in zip(results, children, strict=True):
    assert child.returncode == 0, err
    assert out.endswith("fine\n"), out + err
  assert "step 5" in results[0][0]
  assert "process 0" in results[1][0]
  # Two processes to one.
  rows = np.arange(64, dtype=np.float32).reshape(8, 8) + 6
  template = {"rows": jnp.zeros((8, 8)), "none": jnp.zeros(0)}
  with Checkpointer(folder) as keeper:
    restored = keeper.restore(template)
  assert restored.step == 6
  assert_same_bits(restored.state["rows"], rows)
