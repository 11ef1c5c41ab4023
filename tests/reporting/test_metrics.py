"""Metrics: every step once, nothing half-written, lines a person can read."""

import contextlib
import io
import json
import math
import os
import pathlib
import pty
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rspo_jax.reporting import terminal
from rspo_jax.reporting.metrics import (
  MetricsError,
  MetricsWriter,
  NonFiniteMetric,
  read_rows,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]


def plain(workdir, total_steps=10, **kwargs):
  kwargs.setdefault("stream", io.StringIO())
  return MetricsWriter(workdir, total_steps, tensorboard=False, **kwargs)


def steps_of(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["step"] for line in lines]


# --- rows ---


def test_a_row_is_one_line_with_the_step_first_and_exact_values(tmp_path):
  values = {"loss": 0.1 + 0.2, "eval/n": 1024, "lr": 5e-324, "gap/std": -0.0}
  with plain(tmp_path) as writer:
    writer.write(0, values)
    # Out at once: a kill loses nothing.
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert line.startswith('{"step": 0, ')
  row = json.loads(line)
  assert list(row) == ["step", *values]
  assert {k: row[k] for k in values} == values
  assert isinstance(row["eval/n"], int)
  assert math.copysign(1, row["gap/std"]) == -1


def test_numbers_of_numpy_are_numbers_and_arrays_are_not(tmp_path):
  with plain(tmp_path) as writer:
    writer.write(
      0, {"a": np.float32(0.5), "b": np.array(3), "c": True, "d": np.int64(7)}
    )
    with pytest.raises(TypeError, match="reward/mean is a ndarray"):
      writer.write(1, {"reward/mean": np.ones(3)})
    with pytest.raises(TypeError, match="name is a str"):
      writer.write(1, {"name": "x"})
    with pytest.raises(ValueError, match="step"):
      writer.write(1, {"step": 1})
  assert list(read_rows(tmp_path / "metrics.jsonl")) == [
    {"step": 0, "a": 0.5, "b": 3, "c": 1, "d": 7}
  ]


def test_a_step_is_never_written_twice(tmp_path):
  with plain(tmp_path) as writer:
    writer.write(0, {"loss": 1.0})
    writer.write(2, {"loss": 1.0})
    for step in (2, 1, 0):
      with pytest.raises(ValueError, match="step 2"):
        writer.write(step, {"loss": 2.0})
  with plain(tmp_path) as writer, pytest.raises(ValueError, match="step 2"):
    writer.write(2, {"loss": 2.0})
  assert steps_of(tmp_path) == [0, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_and_its_row_kept(tmp_path, value):
  with plain(tmp_path) as writer:
    with pytest.raises(NonFiniteMetric, match=r"Step 4.*grad_norm") as caught:
      writer.write(4, {"loss": 1.0, "grad_norm": value, "lr": 0.5})
    assert (caught.value.step, caught.value.keys) == (4, ("grad_norm",))
    writer.write(5, {"loss": 2.0})

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  text = (tmp_path / "metrics.jsonl").read_text()
  rows = [json.loads(x, parse_constant=refuse) for x in text.splitlines()]
  assert rows == [
    {"step": 4, "loss": 1.0, "grad_norm": None, "lr": 0.5},
    {"step": 5, "loss": 2.0},
  ]


def test_an_inactive_writer_leaves_no_trace_but_still_checks(tmp_path, capfd):
  with MetricsWriter(tmp_path / "run", 10, active=False) as writer:
    assert writer.truncate_to(3) == []
    writer.write(4, {"loss": 1.0})
    writer.histogram(4, "d", [1.0])
    writer.text(4, "sample", "x")
    writer.say("hello")
    writer.warn("hello")
    writer.table([{"a": 1}])
    with writer.phase("compiling"):
      pass
    with pytest.raises(NonFiniteMetric):
      writer.write(5, {"loss": math.nan})
  assert not (tmp_path / "run").exists()
  assert capfd.readouterr() == ("", "")


# --- resume ---


def test_after_truncation_every_step_is_there_once(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with plain(tmp_path) as writer:
    assert writer.truncate_to(-1) == []
    for step in range(8):
      writer.write(step, {"loss": step / 3})
  whole = path.read_bytes()
  with plain(tmp_path) as writer:
    for last in (4, 2, -1):  # in mid-run, too, and to nothing
      assert writer.truncate_to(last) == []
      for step in range(last + 1, 8):
        writer.write(step, {"loss": step / 3})
      assert path.read_bytes() == whole
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_half_written_last_line_goes_and_does_not_spoil_the_next(tmp_path):
  path = tmp_path / "metrics.jsonl"
  for truncates in (True, False):
    path.write_bytes(b'{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    with plain(tmp_path) as writer:
      if truncates:
        (message,) = writer.truncate_to(0)
        assert "line 2" in message
      writer.write(1, {"loss": 2.0})
    assert steps_of(tmp_path) == [0, 1]


@settings(
  max_examples=100,
  deadline=None,
  suppress_health_check=list(HealthCheck),
  database=None,
)
@given(
  st.lists(
    st.one_of(
      st.binary(max_size=20),
      st.integers(-2, 9).map(lambda s: json.dumps({"step": s}).encode()),
      st.sampled_from([b"[]", b"{}", b'{"step": true}', b"[" * 5000, b"\xff"]),
    ),
    max_size=8,
  ),
  st.booleans(),
  st.integers(-1, 9),
)
def test_any_file_is_brought_into_order(tmp_path, lines, ends, step):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b"\n".join(lines) + (b"\n" if ends else b""))
  with plain(tmp_path) as writer:
    writer.truncate_to(step)
    writer.write(step + 1, {"loss": 0.0})
  steps = steps_of(tmp_path)
  assert steps == sorted(set(steps))
  assert steps[-1] == step + 1


def test_a_truncation_that_fails_leaves_the_file_as_it_was(
  tmp_path, monkeypatch
):
  with plain(tmp_path) as writer:
    for step in range(3):
      writer.write(step, {"loss": 0.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def no_room(source, target):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_room)
    with pytest.raises(MetricsError, match="No space left"):
      writer.truncate_to(0)
  assert (tmp_path / "metrics.jsonl").read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_leaves_whole_rows_and_the_step_can_be_retried(tmp_path):
  with plain(tmp_path) as writer:
    writer.write(0, {"loss": 1.0})
    # Room for a part of the next row.
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with (
      tiny_runs.full_disk(size + 10),
      pytest.raises(MetricsError, match="Make room"),
    ):
      writer.write(1, {"loss": 2.0})
    assert steps_of(tmp_path) == [0]
    writer.write(1, {"loss": 2.0})
  assert steps_of(tmp_path) == [0, 1]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    plain(tmp_path / "file") as writer,
    pytest.raises(MetricsError, match=str(tmp_path / "file")),
  ):
    writer.write(0, {"loss": 1.0})


# --- TensorBoard ---


def events_of(workdir):
  """Reads event files: length, checksum, record, checksum."""
  from tensorboardX.proto import event_pb2

  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")
      yield event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]


def test_tensorboard_gets_the_finite_values_and_forgets_steps_past_resume(
  tmp_path,
):
  stream = io.StringIO()
  with MetricsWriter(tmp_path, 10, stream=stream) as writer:
    writer.write(1, {"loss": 0.5, "eval/accuracy": 0.25})
    with pytest.raises(NonFiniteMetric):
      writer.write(2, {"loss": math.nan, "lr": 1.0})
    writer.histogram(2, "gap", np.array([[1.0, math.nan], [3.0, 4.0]]))
    writer.histogram(2, "nothing", [math.nan])
    writer.text(2, "samples", "<|x|> *3 + 4*\nsecond")
  first = list(events_of(tmp_path))
  scalars = {
    (e.step, v.tag): v.simple_value
    for e in first
    for v in e.summary.value
    if v.HasField("simple_value")
  }
  assert scalars == {
    (1, "loss"): 0.5,
    (1, "eval/accuracy"): 0.25,
    (2, "lr"): 1.0,
  }
  others = [v for e in first for v in e.summary.value if v.HasField("metadata")]
  (histogram,) = (
    v.histo for e in first for v in e.summary.value if v.HasField("histo")
  )
  assert (histogram.num, histogram.sum) == (3, 8)
  assert any(
    b"    <|x|> *3 + 4*\n    second" in v.tensor.string_val[0] for v in others
  )
  with MetricsWriter(tmp_path, 10, stream=stream) as writer:
    writer.truncate_to(1)
    writer.write(2, {"loss": 0.75})
  # TensorBoard drops what comes at or past the step of a START record.
  starts = [
    e.step
    for e in events_of(tmp_path)
    if e.HasField("session_log") and e.session_log.status == 1
  ]
  assert starts == [2]


# --- what a person sees ---


def test_plain_lines_come_first_now_and_then_and_last(tmp_path, monkeypatch):
  stream = io.StringIO()
  clock = [100.0]
  monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
  with plain(tmp_path, 40, stream=stream) as writer:
    for step in range(41):
      clock[0] += 1.0
      writer.write(
        step,
        {
          "reward/mean": float(step >= 20),
          "eval/accuracy": 0.5,
          "calibration/slope": 0.987,
          "rollout/tokens_per_s": 12345.6,
        },
      )
  lines = stream.getvalue().splitlines()
  shown = [int(re.match(r"step (\d+)/40", line)[1]) for line in lines]
  assert shown == [*range(0, 41, 5)]
  assert lines[4] == (
    "step 20/40  0:20 left  reward 0.100 (+0.100)  accuracy 0.500  slope 0.99"
    "  12,346 tokens/s"
  )
  assert "reward 1.000 (+0.900)" in lines[6]  # steps 21-30 against 11-20
  assert "reward 1.000 (+0.000)" in lines[8]


def test_a_run_that_stops_early_shows_its_last_step(tmp_path):
  stream = io.StringIO()
  with plain(tmp_path, 1000, stream=stream) as writer:
    for step in range(4):
      writer.write(step, {"reward/mean": 0.0})
  lines = stream.getvalue().splitlines()
  assert [line.split()[1] for line in lines] == ["0/1000", "3/1000"]


def test_time_in_phases_does_not_count_as_the_steps(tmp_path, monkeypatch):
  stream = io.StringIO()
  clock = [0.0]
  monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
  with plain(tmp_path, 100, stream=stream) as writer:
    for step in range(3):
      with writer.phase("evaluating"), writer.phase("compiling"):
        clock[0] += 50.0
      clock[0] += 2.0
      writer.write(step, {})
  text = stream.getvalue()
  assert "evaluating ...\n" in text
  assert "evaluating: 50.0 s\n" in text
  assert "step 2/100  3:16 left" in text


def test_quiet_and_debug(tmp_path):
  def shown(**kwargs):
    stream = io.StringIO()
    with plain(tmp_path / str(kwargs), stream=stream, **kwargs) as writer:
      writer.write(0, {"reward/mean": 0.0})
      writer.say("said")
      writer.debug("detail")
      writer.warn("careful")
      writer.table([{"n": 1}])
      with writer.phase("compiling"):
        pass
    return stream.getvalue()

  assert shown(quiet=True) == "careful\n"
  normal = shown()
  assert "said\n" in normal
  assert "detail" not in normal
  assert "said\ndetail\ncareful\n" in shown(debug=True)


def test_a_table_is_set_in_columns(tmp_path):
  stream = io.StringIO()
  with plain(tmp_path, stream=stream) as writer:
    writer.table([])
    writer.table(
      [
        {"split": "validation", "accuracy": 0.31234, "n": 1024},
        {"split": "test", "accuracy": None, "n": 7},
      ],
      title="Evaluation",
    )
  assert stream.getvalue() == (
    "Evaluation\n"
    "split       accuracy     n\n"
    "validation    0.3123  1024\n"
    "test                     7\n"
  )


TERMINAL = """
import sys, time
from rspo_jax.reporting.metrics import MetricsWriter
with MetricsWriter(sys.argv[1], 20, tensorboard=False) as writer:
  with writer.phase("compiling rollout"):
    time.sleep(0.7)
  for step in range(21):
    writer.write(step, {"reward/mean": 0.5, "eval/accuracy": 0.25})
    time.sleep(0.01)
  writer.say("a [bold]completion[/bold] [/nonsense]")
  writer.table([{"split": "test [x]", "accuracy": 0.5}])
"""


def test_a_terminal_gets_one_live_line_and_its_cursor_back(tmp_path):
  ours, theirs = pty.openpty()
  child = subprocess.Popen(
    [sys.executable, "-c", TERMINAL, str(tmp_path)],
    stdout=theirs,
    stderr=theirs,
    cwd=ROOT,
    env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
  )
  os.close(theirs)
  shown = b""
  with contextlib.suppress(OSError):  # how a pty says that it is closed
    while data := os.read(ours, 4096):
      shown += data
  os.close(ours)
  assert child.wait() == 0, shown.decode()
  text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
  assert re.search(r"compiling rollout \d s", text)
  assert re.search(r"compiling rollout: \d\.\d s", text)
  assert "step 20/20" in text
  assert "reward 0.500" in text
  assert "a [bold]completion[/bold] [/nonsense]" in text
  assert "test [x]" in text
  assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h") == 1
  assert "Traceback" not in text


def test_rich_and_tensorboard_are_loaded_when_needed():
  code = (
    "import sys; import rspo_jax.reporting.metrics; "
    "heavy = {'rich', 'tensorboardX', 'numpy', 'jax'} & set(sys.modules); "
    "sys.exit(repr(heavy) if heavy else 0)"
  )
  result = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr


def test_a_row_costs_less_than_2_percent_of_a_300_ms_step(tmp_path):
  row = {f"group/metric_{i}": i / 7 for i in range(30)}
  with MetricsWriter(tmp_path, 200, stream=io.StringIO()) as writer:
    writer.write(0, row)
    took_s = []
    for step in range(1, 60):
      start_s = time.thread_time()  # other processes are not our cost
      writer.write(step, row)
      took_s.append(time.thread_time() - start_s)
  assert sorted(took_s)[len(took_s) // 2] < 0.006
