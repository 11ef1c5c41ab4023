"""What goes wrong in a run: said, counted, survived, and never learned from."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import threading
import time

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from hypothesis import strategies as st

from benchmarks import kill
from rspo_jax import main
from rspo_jax.algorithm.types import RolloutBatch
from rspo_jax.devices import sharding
from rspo_jax.run import collapse, evaluate, incident, rollout
from rspo_jax.run import program as program_lib
from rspo_jax.run import step as step_lib
from rspo_jax.run.compiled import Compiled
from rspo_jax.storage.checkpoint import Checkpointer

STEPS = tiny_runs.SMALL["run.steps"]

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def program(tiny):
  """The compiled program of the runs here."""
  return tiny_runs.program_of(tiny("unused"))


def poison(monkeypatch, *steps):
  """Makes advantages and targets of the given steps (from 1) NaN."""
  original = step_lib.roll_out

  def poisoned(run, *args):
    made = original(run, *args)
    if run.state.step + 1 in steps:
      bad = made.batch.advantage * jnp.nan
      made.batch = made.batch.replace(advantage=bad, target=bad)
    return made

  monkeypatch.setattr(step_lib, "roll_out", poisoned)


# Numbers that are no numbers.


def test_a_step_that_is_not_finite_is_not_applied_and_can_be_computed_again(
  tiny, tmp_path, monkeypatch, program, capsys
):
  poison(monkeypatch, 1)
  assert main.main(tiny(tmp_path, run__steps=2, eval__every=0)) == 0
  folder = tmp_path / "incident" / "step_00000001"
  said = capsys.readouterr().out
  assert (
    "Step 1 is not finite: grad_norm = nan, loss = nan" in said
    and str(folder) in said
  )
  rows = tiny_runs.rows(tmp_path)
  assert [row["loss"] is None for row in rows[1:]] == [True, False]
  assert [row["update/applied"] for row in rows[1:]] == [0, 1]
  assert [row["faults/not_finite"] for row in rows[1:]] == [1, 1]
  # Step 2 began where step 1 had: at the reference.
  assert rows[2]["score/relative_std"] == 0 < rows[2]["grad_norm"]
  # From what was written alone: the same masks, the same scores.
  record, arrays = incident.load(folder)
  assert record["not_finite"]["loss"] == "nan" and record["in_a_row"] == 1
  assert np.isnan(arrays["batch.advantage"]).all()
  batch = RolloutBatch(
    **{
      field.name: arrays.get(f"batch.{field.name}")
      for field in dataclasses.fields(RolloutBatch)
    }
  )
  masks = jax.random.wrap_key_data(np.array(record["keys"]["masks"], np.uint32))
  again = sharding.put_global(program.mesh, batch)
  scores = program.estimate_fn(program.reference, again, masks)
  np.testing.assert_array_equal(scores, arrays["scores.0.reference"])
  prompts = np.array(batch.tokens)[:, : program.settings.data.prompt_length]
  texts = program.to_text(prompts, batch.token_mask[:, : prompts.shape[1]])
  for text, prompt in zip(record["texts"], texts, strict=True):
    assert text.startswith(prompt)


def test_three_in_a_row_stop_the_run_with_3_at_its_last_good_state(
  whole, tiny, tmp_path, monkeypatch, program, capsys
):
  with monkeypatch.context() as patch:
    poison(patch, 3, 4, 5)
    assert main.main(tiny(tmp_path, run__checkpoint_every=4)) == 3
  error = capsys.readouterr().err
  assert "3 steps in a row up to step 5" in error
  assert "the last good state, of step 2, is saved" in error
  assert "Traceback" not in error
  restored = tiny_runs.newest(tmp_path, program)
  assert restored.step == int(restored.state["train"].step) == 2
  assert len(list((tmp_path / "incident").iterdir())) == 3
  # The culprit gone, nothing remains of it.
  assert main.main(tiny(tmp_path, run__checkpoint_every=4)) == 0
  tiny_runs.assert_same_run(tmp_path, whole, program)


def test_a_run_that_is_stopped_amid_bad_steps_counts_on(
  tiny, tmp_path, monkeypatch, program
):
  poison(monkeypatch, 2, 3, 4)
  # In the evaluation, so that the row of step 2 has still to be written.
  tiny_runs.disturb(monkeypatch, "evaluate", 2, tiny_runs.ask_to_stop)
  assert main.main(tiny(tmp_path)) == 75
  assert main.main(tiny(tmp_path)) == 3
  assert tiny_runs.newest(tmp_path, program).step == 1
  rows = tiny_runs.rows(tmp_path)
  assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
  assert [row["loss"] is None for row in rows[1:]] == [False, *[True] * 3]


def test_a_run_can_be_told_to_go_on_regardless(tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(incident, "KEPT", 2)
  poison(monkeypatch, *range(1, STEPS))
  command = tiny(tmp_path, run__non_finite_limit=0, run__export=False)
  assert main.main(command) == 0
  last = tiny_runs.rows(tmp_path)[-1]
  assert last["faults/not_finite"] == STEPS - 1 and last["update/applied"] == 1
  # Enough is enough: incidents must not fill the disk.
  assert len(list((tmp_path / "incident").iterdir())) == 2


def test_a_state_that_is_not_finite_is_never_saved(
  whole, tiny, tmp_path, monkeypatch, program, capsys
):
  def overflow(run):
    params = jax.tree.map(lambda x: x * jnp.inf, run.state.train.params)
    run.state.train = run.state.train.replace(params=params)

  tiny_runs.disturb(monkeypatch, "check_state", 4, overflow)
  assert main.main(tiny(tmp_path)) == 3
  assert "step 4 parameters or moments" in capsys.readouterr().err
  assert tiny_runs.newest(tmp_path, program).step == 2
  assert main.main(tiny(tmp_path)) == 0
  tiny_runs.assert_same_run(tmp_path, whole, program)


def test_one_bad_number_anywhere_in_a_state_is_found():
  state = {"w": np.ones((3, 5), np.float32), "step": np.int32(7)}
  assert program_lib.is_finite(state)
  for bad in (np.nan, np.inf, -np.inf):
    state["w"][2, 4] = bad
    assert not program_lib.is_finite(state)


@pytest.mark.parametrize(
  ("values", "bad"),
  [
    ({"loss": 1.0, "update/applied": 1.0}, []),
    ({"loss": math.nan, "grad_norm": math.inf}, ["grad_norm", "loss"]),
    # Only scores were not finite, and no metric shows it.
    (
      {"loss": 0.0, "update/applied": 0.0, "update/kept_share": 0.5},
      ["update/applied"],
    ),
    # Nothing was kept: no fault.
    ({"loss": 0.0, "update/applied": 0.0, "update/kept_share": 0.0}, []),
  ],
)
def test_what_counts_as_not_finite(values, bad):
  assert sorted(incident.not_finite(values)) == bad


def test_a_disk_that_refuses_an_incident_is_said_and_no_more(tmp_path):
  (tmp_path / "incident").write_text("in the way")
  folder = incident.folder_of(tmp_path, 3)
  message = incident.write(folder, {"step": 3}, {"a": np.zeros(2)})
  assert str(folder) in message and "could not be written" in message


# Batches that have nothing to say.


@pytest.mark.parametrize("skip", [True, False])
def test_batches_without_differences_are_counted_and_move_nothing_at_first(
  skip, tiny, tmp_path, monkeypatch, program
):
  judge = rollout.judge

  def worthless(*args):
    judged = judge(*args)
    verdicts = [dataclasses.replace(v, reward=0.0) for v in judged.verdicts]
    return dataclasses.replace(
      judged, texts=[""] * len(verdicts), verdicts=verdicts
    )

  monkeypatch.setattr(rollout, "judge", worthless)
  command = tiny(
    tmp_path,
    run__steps=2,
    eval__every=0,
    objective__skip_equal_groups=skip,
  )
  assert main.main(command) == 0
  rows = tiny_runs.rows(tmp_path)[1:]
  assert [row["faults/degenerate"] for row in rows] == [1, 2]
  assert [row["rollout/empty_share"] for row in rows] == [1, 1]
  assert all(math.isfinite(value) for row in rows for value in row.values())
  # While policy and reference are one, the pull to the reference is zero.
  params = tiny_runs.newest(tmp_path, program).state["train"].params
  jax.tree.map(np.testing.assert_array_equal, params, program.reference)


# Collapse.


def see(watch, steps, **values):
  """Shows a watch some steps alike; returns what it says."""
  names = {
    "entropy": ("score/policy_mean", -1),
    "distinct": ("rollout/distinct_share", 1),
    "length": ("rollout/length_mean", 1),
    "equal": ("reward/equal_groups", 1),
  }
  row = {names[k][0]: names[k][1] * v for k, v in values.items()}
  said = [watch.see(row, window=5, group_size=4) for _ in range(steps)]
  return [line for lines in said for line in lines]


HEALTHY = {"entropy": 1.0, "distinct": 0.8, "length": 20, "equal": 0.3}


@pytest.mark.parametrize(
  ("sign", "bad", "fine", "said"),
  [
    ("entropy", 0.05, 0.2, "entropy is collapsing"),
    ("distinct", 0.25, 0.3, "alike"),
    ("length", 4, 6, "tokens"),
    ("equal", 0.97, 0.9, "equal rewards"),
  ],
)
def test_a_collapse_is_said_once_and_again_when_it_returns(
  sign, bad, fine, said
):
  watch = collapse.Watch()
  assert see(watch, 20, **HEALTHY) == []
  assert see(watch, 20, **HEALTHY | {sign: fine}) == []
  (line,) = see(watch, 20, **HEALTHY | {sign: bad})
  assert said in line and "Over the last 5 steps" in line
  # What was seen travels in the checkpoint.
  watch = collapse.Watch(**json.loads(json.dumps(dataclasses.asdict(watch))))
  assert see(watch, 10, **HEALTHY | {sign: bad}) == []
  assert see(watch, 20, **HEALTHY) == []
  assert len(see(watch, 20, **HEALTHY | {sign: bad})) == 1


def test_nothing_is_said_before_there_is_enough_to_see():
  watch = collapse.Watch()
  assert see(watch, 4, **HEALTHY | {"equal": 1.0}) == []
  assert len(see(watch, 1, **HEALTHY | {"equal": 1.0})) == 1
  assert collapse.Watch().see({"reward/equal_groups": 1.0}, 0, 4) == []


# Signals, amid each phase.


@pytest.mark.parametrize(
  "phase",
  ["rollout", "reward", "scores", "update", "save", "greedy evaluation"],
)
def test_a_signal_amid_a_phase_ends_the_run_with_75_within_10_seconds(
  phase, whole, tiny, tmp_path, monkeypatch, program
):
  sent = []

  def signal_soon():
    if not sent:
      sent.append(time.monotonic())
      # While the main thread is busy inside.
      threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()

  def around(owner, method, applies):
    original = getattr(owner, method)

    def wrapped(self, *args):
      if applies(self):
        signal_soon()
        time.sleep(0.05)
      return original(self, *args)

    monkeypatch.setattr(owner, method, wrapped)

  if phase == "reward":
    around(program_lib.Program, "judge", lambda self: True)
  elif phase == "save":
    around(Checkpointer, "save", lambda self: True)
  else:
    around(Compiled, "__call__", lambda self: self.name == phase)
  assert main.main(tiny(tmp_path)) == 75
  assert time.monotonic() - sent[0] < 10
  assert main.main(tiny(tmp_path)) == 0
  tiny_runs.assert_same_run(tmp_path, whole, program)


# What is kept, and what may change.


def test_the_best_by_validation_is_kept_beside_the_last(
  tiny, tmp_path, monkeypatch
):
  original = evaluate.evaluate
  accuracy_by_step = {0: 0.1, 2: 0.9, 4: 0.2, STEPS: 0.3}

  def graded(run, stem):
    found, greedy = original(run, stem)
    accuracy = accuracy_by_step[run.state.step]
    return found | {"eval/accuracy": accuracy}, greedy

  monkeypatch.setattr(evaluate, "evaluate", graded)
  command = tiny(
    tmp_path,
    run__checkpoint_every=100,
    run__keep_checkpoints=1,
    run__keep_best=1,
  )
  assert main.main(command) == 0
  with Checkpointer(tmp_path / "checkpoints") as checkpointer:
    assert checkpointer.steps() == [2, STEPS]


def test_a_config_that_means_something_else_is_accepted_when_told_so(
  whole, tiny, tmp_path, program, capsys
):
  folder = shutil.copytree(whole, tmp_path / "run")
  changed = {"run__steps": STEPS + 1, "objective__lambda_": 2.0}
  assert main.main(tiny(folder, **changed)) == 2
  assert "run.accept_changes=true" in capsys.readouterr().err
  command = tiny(folder, **changed, run__accept_changes=True)
  assert main.main(command) == 0
  said = capsys.readouterr().out
  assert f"From step {STEPS} on" in said
  assert "objective.lambda_=2.0 (was 3.0)" in said
  rows = tiny_runs.repeatable(folder)
  assert rows[:-1] == tiny_runs.repeatable(whole)
  assert rows[-1]["step"] == STEPS + 1
  before = json.loads((folder / f"config-until-{STEPS:06d}.json").read_text())
  assert before == json.loads((whole / "config.json").read_text())
  assert tiny_runs.newest(folder, program).step == STEPS + 1


@pytest.mark.parametrize(
  ("changed", "said"),
  [
    ({"run__steps": 3}, "run.steps=3, but the run has reached step 5"),
    ({"optimizer__moment_dtype": "bfloat16"}, "another model or optimizer"),
  ],
)
def test_what_the_state_cannot_follow_is_refused_all_the_same(
  changed, said, whole, tiny, tmp_path, capsys
):
  folder = shutil.copytree(whole, tmp_path / "run")
  (folder / "summary.json").unlink()
  before = tiny_runs.files(folder)
  command = tiny(folder, **changed, run__accept_changes=True)
  assert main.main(command) == 2
  assert said in capsys.readouterr().err
  assert tiny_runs.files(folder) == before


# Bytes that change while nobody looks.


def test_a_run_goes_on_from_what_was_written_or_says_why_not(
  whole, tiny, tmp_path, program, capsys
):
  half = shutil.copytree(whole, tmp_path / "half")
  (half / "summary.json").unlink()
  shutil.rmtree(half / "checkpoints" / "step_00000005")
  names = sorted(
    str(path.relative_to(half))
    for part in ("checkpoints", "config.json")
    for path in [half / part, *(half / part).rglob("*")]
    if path.is_file() and path.stat().st_size
  )

  @hypothesis.settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    database=None,
  )
  @hypothesis.given(st.data())
  def check(data):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(half, folder)
    for name in data.draw(st.sets(st.sampled_from(names), min_size=1)):
      path = folder / name
      content = path.read_bytes()
      at = data.draw(st.integers(0, len(content) - 1))
      patch = data.draw(st.binary(max_size=8))
      path.write_bytes(content[:at] + patch + content[at + 4 :])
    capsys.readouterr()
    status = main.main(tiny(folder))
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if status == 0:
      tiny_runs.assert_same_run(folder, whole, program)
    else:
      assert status in (2, 3)
      assert said.err.startswith("error: ") and str(folder) in said.err

  check()


# Moments that nobody chose.


def test_a_run_that_is_killed_at_random_moments_is_the_run_of_one_go(
  whole, tiny, tmp_path, program
):
  # `python benchmarks/kill.py` kills far more, and two processes too.
  found = kill.kill_runs(
    lambda name: [kill.start(tiny(tmp_path / name, run__checkpoint_every=1))],
    tmp_path,
    whole,
    program,
    2,
    kill.Killer(random.Random(1), life_s=4.0),
  )
  assert found["kills"] == 2 and found["different"] == []


@pytest.mark.slow
def test_a_process_whose_partner_is_killed_ends_with_3_soon(tiny, tmp_path):
  argv = tiny(tmp_path / "run", run__steps=1000, run__checkpoint_every=1)
  first, second = kill.start_pair(argv)
  for line in first.stdout:
    if line.startswith("step 1/"):
      break
  second.kill()
  second.communicate()
  rest = first.communicate(timeout=60)[0]
  assert first.returncode == 3
  assert "Another process of the run has gone" in rest
  assert "Traceback" not in rest
