"""Whole runs, tiny: what they leave behind, and that nothing can be lost."""

import collections
import fcntl
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import tiny_runs

import rspo_jax
from rspo_jax import main, workdir
from rspo_jax import program as program_lib
from rspo_jax.runs import Run, Stopwatch, evaluation_prompts

ROOT = pathlib.Path(__file__).resolve().parent.parent
KINDS = ("greedy", "sampled")
STEPS = tiny_runs.SMALL["run.steps"]

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def whole_supervised(tiny, tmp_path_factory):
  """The folder of an undisturbed supervised run."""
  folder = tmp_path_factory.mktemp("supervised") / "run"
  with tiny_runs.quick():
    assert main.main(tiny(folder, **supervised())) == 0
  return folder


@pytest.fixture(scope="module")
def whole_kept(tiny, tmp_path_factory):
  """The folder of an undisturbed run that keeps groups of equal rewards."""
  folder = tmp_path_factory.mktemp("kept") / "run"
  with tiny_runs.quick():
    assert main.main(tiny(folder, **KEPT)) == 0
  return folder


def supervised():
  """Overrides of a supervised run with corrupt demonstrations."""
  values = tiny_runs.SUPERVISED | {
    "data.corrupt_share": 0.5,
    "likelihood.scope": "canvas",
    "optimizer.schedule": "cosine",
  }
  return {key.replace(".", "__"): value for key, value in values.items()}


@pytest.fixture
def program(tiny):
  """The compiled program of the runs here (but the supervised ones)."""
  return tiny_runs.program_of(tiny("unused"))


# What a run leaves behind.


def test_a_run_leaves_the_files_of_the_contract(whole):
  names = {path.name for path in whole.iterdir()}
  assert names == {
    "config.json",
    "environment.json",
    "metrics.jsonl",
    "checkpoints",
    "samples",
    "tensorboard",
    "model",
    "summary.json",
  }
  config = json.loads((whole / "config.json").read_text())
  assert config["rollout"]["prompts"] == 8
  assert config["run"]["steps"] == STEPS
  kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
  assert kept == ["step_00000002", "step_00000004", "step_00000005"]
  summary = json.loads((whole / "summary.json").read_text())
  rows = tiny_runs.rows(whole)
  for part, row in (("before", rows[0]), ("after", rows[-1])):
    expected = {k: v for k, v in row.items() if k.startswith("eval/")}
    assert summary[part] == expected
  assert sum(row["n"] for row in summary["by_difficulty"]) == 12


def test_metrics_hold_every_step_once_with_the_keys_of_the_contract(whole):
  rows = tiny_runs.rows(whole)
  assert [row["step"] for row in rows] == list(range(STEPS + 1))
  evaluation = {
    "eval/accuracy",
    "eval/accuracy_sampled",
    "eval/reward",
    "eval/n",
    "eval/ci_low",
    "eval/ci_high",
  }
  step = {
    "loss",
    "grad_norm",
    "lr",
    "reward/mean",
    "reward/std",
    "reward/equal_groups",
    "score/relative_mean",
    "score/relative_std",
    "score/mask_variance",
    "gap/std",
    "gap/lambda_share",
    "calibration/slope",
    "calibration/correlation",
    "rollout/tokens_per_s",
    "rollout/denoiser_calls",
    "rollout/length_mean",
    "time/rollout_s",
    "time/reward_s",
    "time/score_s",
    "time/update_s",
    "time/step_s",
    "time/data_s",
    "time/host_share",
  }
  for row in rows:
    assert step <= row.keys() or row["step"] == 0
    evaluated = row["step"] in (0, 2, 4, STEPS)
    assert (evaluation <= row.keys()) == evaluated
    assert all(math.isfinite(value) for value in row.values())
  assert rows[0]["eval/n"] == 12


def test_the_host_share_is_what_the_device_waited_for_at_most():
  watch = Stopwatch()
  watch.seconds = {
    "time/data_s": 1.0,
    "time/rollout_s": 4.0,
    "time/reward_s": 2.0,
    "time/score_s": 1.0,
    "time/update_s": 2.0,
  }
  assert watch.host_share(10.0) == pytest.approx(0.3)
  # The device scored while the host verified.
  watch.overlapped_s = 2.0
  assert watch.host_share(10.0) == pytest.approx(0.1)


@pytest.mark.parametrize("skip", [False, True])
def test_scores_that_need_no_reward_are_begun_before_the_rewards(
  skip, whole, whole_kept, tiny, tmp_path, monkeypatch
):
  del whole, whole_kept  # compiled by then
  events = tiny_runs.noted(
    monkeypatch,
    rewards=(program_lib.Program, "judge"),
    scores=(Run, "scores"),
  )
  argv = tiny(tmp_path / "run", objective__skip_equal_groups=skip, run__steps=2)
  assert main.main(argv) == 0
  # What an evaluation judges comes before the first step and after the last.
  first = events.index("scores")
  last = len(events) - events[::-1].index("scores")
  steps = events[first - skip : last + (not skip)]
  order = ["rewards", "scores"] if skip else ["scores", "rewards"]
  assert steps == order * 2


def test_at_the_start_policy_and_reference_score_exactly_alike(whole):
  rows = tiny_runs.rows(whole)
  assert rows[1]["score/relative_std"] == rows[1]["score/relative_mean"] == 0
  assert rows[1]["score/mask_variance"] == rows[1]["loss"] == 0
  assert rows[1]["grad_norm"] > 0
  assert rows[2]["score/relative_std"] > 0


@pytest.mark.parametrize(
  ("dtype", "std", "said"),
  [
    ("float32", 9e-7, ""),
    ("float32", 2e-6, "inside the first update are off by 2.00e-06"),
    ("bfloat16", 3e-3, "Noise floor of d in bfloat16: 3.0e-03"),
  ],
)
def test_the_first_update_is_held_to_the_agreement(dtype, std, said):
  words = []
  run = types.SimpleNamespace(
    step=0,
    settings=types.SimpleNamespace(
      objective=types.SimpleNamespace(subtract_reference=True)
    ),
    program=types.SimpleNamespace(
      model=types.SimpleNamespace(
        config=types.SimpleNamespace(compute_dtype=dtype)
      )
    ),
    writer=types.SimpleNamespace(warn=words.append, say=words.append),
  )
  values = {"score/relative_mean": -1e-7, "score/relative_std": std}
  Run.check_first_update(run, values)
  assert len(words) == bool(said) and said in "".join(words)
  words.clear()
  run.step = 1
  Run.check_first_update(run, values)
  assert not words


def test_two_processes_do_not_train_in_one_folder(
  whole, tmp_path, tiny, capsys
):
  folder = tmp_path / "run"
  folder.mkdir()
  other = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert main.main(tiny(folder)) == 2
    assert "another process trains there" in capsys.readouterr().err
    assert not list(folder.iterdir())
  finally:
    os.close(other)
  assert main.main(tiny(folder)) == 0
  assert tiny_runs.repeatable(folder) == tiny_runs.repeatable(whole)


@pytest.mark.parametrize("main_process", [True, False])
def test_a_folder_in_use_is_refused_in_every_process(
  main_process, tmp_path, monkeypatch
):
  """Nobody waits for a first process that has given up."""
  told = []

  def gathered(rows):
    told.extend(rows)
    return np.array([False, True])

  monkeypatch.setattr(workdir.sharding, "gather_rows", gathered)
  run = types.SimpleNamespace(
    main_process=main_process, workdir=tmp_path / "run"
  )
  with (
    pytest.raises(ValueError, match="another process trains there"),
    workdir.held(run),
  ):
    raise AssertionError("went on")
  assert told == [True]  # this one was free to go on
  assert (tmp_path / "run").exists() == main_process


def test_what_comes_next_is_printed_as_a_shell_reads_it(tiny, tmp_path, capsys):
  folder = tmp_path / "my run's"
  assert main.main(tiny(folder, objective__lambda_=0.0, run__steps=1)) == 0
  said = " ".join(capsys.readouterr().out.split())
  assert "this run was advantage-weighted ELBO" in said
  words = shlex.split(said.partition("Next: ")[2])
  assert words[:5] == [
    *("python", "-m", "rspo_jax.report", str(folder), "--out=report.html")
  ]
  assert words[8] == f"--model={folder}/model"
  again = [f"--workdir={folder}", "--mode=eval", "--config.eval.split=test"]
  assert words[-3:] == again


def test_samples_hold_prompt_completion_reward_and_verdict(whole):
  names = sorted(path.name for path in (whole / "samples").iterdir())
  evaluated = [f"{step:06d}" for step in (0, 2, 4, STEPS)]
  assert names == sorted(
    [f"eval-{s}-{kind}.jsonl" for s in evaluated for kind in KINDS]
    + [
      f"{kind}-{step:06d}.jsonl"
      for kind in ("train", "calibration")
      for step in range(1, STEPS + 1)
    ]
  )
  puzzles = {}
  for line in (whole / "samples" / "train-000001.jsonl").open():
    row = json.loads(line)
    puzzles[row["prompt"]] = puzzles.get(row["prompt"], 0) + 1
    assert row["reward"] == pytest.approx(share_of_cells(row))
    assert row["reward"] == row["verdict"]["reward"]
    assert row["correct"] == row["verdict"]["correct"]
  assert list(puzzles.values()) == [4] * 8  # groups of one prompt each
  rows = [
    json.loads(line)
    for line in (whole / "samples" / "eval-000000-greedy.jsonl").open()
  ]
  assert [row["index"] for row in rows] == list(range(12))


def test_samples_tell_which_forward_wrote_each_piece(whole):
  for name in ("eval-000000-greedy", "train-000003"):
    for line in (whole / "samples" / f"{name}.jsonl").open():
      row = json.loads(line)
      pieces, steps = row["pieces"], row["commit_step"]
      text = [piece for piece in pieces if not piece.startswith("<")]
      assert "".join(text) == row["completion"]
      # 16 positions, 4 forwards of a block: each writes as many as the others.
      assert len(steps) == len(pieces) and set(steps) <= {0, 1, 2, 3}


def test_calibration_rows_have_the_slope_that_was_logged(whole):
  logged = tiny_runs.rows(whole)
  lambda_ = json.loads((whole / "config.json").read_text())["objective"][
    "lambda_"
  ]
  for step in (2, STEPS):
    rows = [
      json.loads(line)
      for line in (whole / "samples" / f"calibration-{step:06d}.jsonl").open()
    ]
    advantage, estimate = (
      np.array([row[key] for row in rows]) for key in ("advantage", "estimate")
    )
    kept = logged[step]["update/kept_share"]
    assert len(rows) == round(32 * kept)
    slope = np.polyfit(advantage, estimate, 1)[0]
    assert slope == pytest.approx(
      logged[step]["calibration/slope"], rel=1e-3, abs=1e-6
    )
    for row in rows:
      assert row["target"] == pytest.approx(
        row["advantage"] / lambda_, rel=1e-4
      )
      gap = row["advantage"] - lambda_ * row["estimate"]
      assert row["gap"] == pytest.approx(gap, rel=1e-3, abs=1e-4)
    centred = estimate.reshape(-1, 4).sum(1)
    np.testing.assert_allclose(centred, 0, atol=1e-5)


def share_of_cells(row):
  """Share of empty cells that the completion has right, by brute force."""
  puzzle, completion = row["prompt"], row["completion"]
  lines = [
    [
      line
      for line in itertools.permutations("1234")
      if all(c in ("0", d) for c, d in zip(puzzle[i:], line, strict=False))
    ]
    for i in (0, 4, 8, 12)
  ]
  # The one grid that keeps the clues: rows, columns and boxes hold 1..4.
  for grid in itertools.product(*lines):
    cells = "".join("".join(line) for line in grid)
    units = [cells[i::4] for i in range(4)]
    units += [cells[i : i + 2] + cells[i + 4 : i + 6] for i in (0, 2, 8, 10)]
    if all(len(set(unit)) == 4 for unit in units):
      break
  digits = completion[:16].ljust(16, "0")
  empty = [i for i, cell in enumerate(puzzle) if cell == "0"]
  return sum(digits[i] == cells[i] for i in empty) / len(empty)


def test_model_folder_holds_the_parameters_of_the_last_checkpoint(
  whole, program
):
  model = rspo_jax.load_model(whole / "model")
  assert model.tokenizer.decode(model.tokenizer.encode("1234")) == "1234"
  state = tiny_runs.newest(whole, program).state
  jax.tree.map(np.testing.assert_array_equal, model.params, state.params)
  moved = jax.tree.map(
    lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()),
    program.params,
    state.params,
  )
  assert max(jax.tree.leaves(moved)) > 1e-4


def test_nothing_is_compiled_twice_in_a_run(whole, program):
  del whole
  counts = program.compiled_programs()
  # Runs that drop groups do not use it; one that keeps them shares the program.
  assert counts.pop("present_fn") <= 1
  assert set(counts.values()) == {1}, counts


def test_a_run_samples_through_the_cache_and_keeps_the_tails_of_prompts(
  tiny, tmp_path
):
  argv = tiny(
    tmp_path / "run",
    sampler__cache="dual",
    sampler__threshold=0.3,
    sampler__stop_at_eos=True,
    sampler__block_length=8,
    data__prompt_length=12,
    data__long_prompts="keep_tail",
    run__steps=2,
    eval__every=0,
  )
  assert main.main(argv) == 0
  first, *rest = tiny_runs.rows(tmp_path / "run")
  assert first["eval/cut_prompts"] == tiny_runs.SMALL["eval.prompts"]
  for row in rest:
    # Two blocks of 8: a full forward each, at least one and at most 8 more.
    assert 4 <= row["rollout/denoiser_calls"] <= 18
    assert row["data/cut_prompts"] == tiny_runs.SMALL["rollout.prompts"]
    assert row["grad_norm"] > 0
  assert {row["rollout/denoiser_calls"] for row in rest} != {18}
  with pytest.raises(ValueError, match=r"data\.long_prompts"):
    program = tiny_runs.program_of(
      tiny("unused", data__prompt_length=12, run__steps=2)
    )
    evaluation_prompts(program, "validation", 0)


def test_the_same_command_on_a_finished_run_says_so(whole, tiny, capsys):
  before = tiny_runs.files(whole)
  assert main.main(tiny(whole)) == 0
  assert "finished" in capsys.readouterr().out
  assert tiny_runs.files(whole) == before


def test_the_same_command_elsewhere_gives_the_same_run(
  whole, tiny, tmp_path, program
):
  assert main.main(tiny(tmp_path / "again")) == 0
  tiny_runs.assert_same_run(tmp_path / "again", whole, program)


def test_tensorboard_shows_what_metrics_hold(whole):
  events = b"".join(tiny_runs.files(whole / "tensorboard").values())
  for key in tiny_runs.rows(whole)[-1]:
    assert key == "step" or key.encode() in events


def test_tensorboard_shows_distributions_and_completions(whole):
  from tensorboardX.proto import event_pb2

  found = collections.defaultdict(set)
  for content in tiny_runs.files(whole / "tensorboard").values():
    while content:  # length, checksum, event, checksum
      size = int.from_bytes(content[:8], "little")
      event = event_pb2.Event.FromString(content[12 : 12 + size])
      content = content[16 + size :]
      for value in event.summary.value:
        kind = "histogram" if value.HasField("histo") else "other"
        found[kind, value.tag].add(event.step)
        if value.tag.startswith("samples/completions"):
          text = value.tensor.string_val[0].decode()
  steps = set(range(1, STEPS + 1))
  for name in ("reward", "score/relative", "score/centred", "gap"):
    assert found["histogram", name] == steps, name
  (tag,) = [tag for _, tag in found if tag.startswith("samples/completions")]
  assert found["other", tag] == steps
  first = json.loads(
    (whole / "samples" / f"train-{STEPS:06d}.jsonl").open().readline()
  )
  assert first["prompt"] in text and first["completion"] in text
  assert "reward" in text


def test_the_debug_level_tells_where_each_step_went(tiny, tmp_path, capsys):
  command = tiny(tmp_path / "run", run__steps=1, run__log="debug")
  assert main.main(command) == 0
  said = capsys.readouterr().out
  assert re.search(r"[\d,]+ trained parameters on 1 cpu", said)
  assert "32 sequences a step in micro-batches of 16" in said
  assert re.search(r"step 1: \d+\.\d+ s \(.*rollout \d+\.\d+", said)


def test_groups_with_equal_rewards_only_dilute_the_first_gradient(
  whole, whole_kept
):
  # While d = 0 their gap is 0, but they count in the mean. The one run scores
  # before the rewards are known, the other one after it has dropped groups.
  dropped, kept = tiny_runs.rows(whole)[1], tiny_runs.rows(whole_kept)[1]
  share = dropped["update/kept_share"]
  assert share == 1 - dropped["reward/equal_groups"] < 1
  assert kept["update/kept_share"] == 1
  assert kept["grad_norm"] == pytest.approx(
    share * dropped["grad_norm"], rel=1e-5
  )
  for key in ("reward/mean", "reward/std", "rollout/length_mean"):
    assert kept[key] == dropped[key]


# Interruption.


POINTS = [
  ("evaluate", 0),
  ("stop_if_asked", 0),
  ("train_one", 0),
  ("train_one", 1),
  ("stop_if_asked", 2),
  ("train_one", 2),
  ("train_one", 3),
  ("evaluate", 4),
  ("train_one", 4),
  ("stop_if_asked", 5),
]


@pytest.mark.parametrize(("method", "step"), POINTS)
def test_a_run_that_was_asked_to_stop_goes_on_as_if_it_had_not_been(
  method, step, whole, tiny, tmp_path, monkeypatch, program, capsys
):
  folder = tmp_path / "run"
  tiny_runs.disturb(monkeypatch, method, step, tiny_runs.ask_to_stop)
  assert main.main(tiny(folder)) == 75
  assert "the same command goes on" in capsys.readouterr().out
  assert not (folder / "summary.json").exists()
  assert tiny_runs.newest(folder, program).step in (step, step + 1)
  assert main.main(tiny(folder)) == 0
  tiny_runs.assert_same_run(folder, whole, program)


@pytest.mark.parametrize(
  ("method", "step"), [*POINTS[2:8:2], ("evaluate", 5), ("export", 5)]
)
def test_a_run_that_crashed_goes_on_as_if_it_had_not(
  method, step, whole, tiny, tmp_path, monkeypatch, program
):
  folder = tmp_path / "run"
  tiny_runs.disturb(monkeypatch, method, step, tiny_runs.crash)
  with pytest.raises(tiny_runs.CrashError):
    main.main(tiny(folder))
  assert main.main(tiny(folder)) == 0
  tiny_runs.assert_same_run(folder, whole, program)


def test_a_run_that_is_stopped_at_every_step_arrives_all_the_same(
  whole, tiny, tmp_path, monkeypatch, program
):
  for step in range(STEPS):
    tiny_runs.disturb(monkeypatch, "train_one", step, tiny_runs.ask_to_stop)
    assert main.main(tiny(tmp_path)) == 75
  assert main.main(tiny(tmp_path)) == 0
  tiny_runs.assert_same_run(tmp_path, whole, program)


def test_a_supervised_run_goes_on_as_if_it_had_not_been_stopped(
  whole_supervised, tiny, tmp_path, monkeypatch
):
  argv = tiny(tmp_path, **supervised())
  tiny_runs.disturb(monkeypatch, "train_one", 2, tiny_runs.ask_to_stop)
  assert main.main(argv) == 75
  assert main.main(argv) == 0
  program = tiny_runs.program_of(argv)
  tiny_runs.assert_same_run(tmp_path, whole_supervised, program)
  counts = program.compiled_programs()
  assert counts["update_fn"] == counts["greedy_fn"] == 1
  assert counts["rollout_fn"] == counts["estimate_fn"] == 0


def test_a_run_in_bfloat16_goes_on_as_if_it_had_not_been_stopped(
  tiny, tmp_path, monkeypatch
):
  def argv(name):
    return tiny(
      tmp_path / name,
      run__steps=2,
      run__tensorboard=False,
      eval__every=0,
      model__param_dtype="bfloat16",
      model__compute_dtype="bfloat16",
      optimizer__moment_dtype="bfloat16",
      **supervised() | {"optimizer__schedule": "constant"},
    )

  assert main.main(argv("whole")) == 0
  tiny_runs.disturb(monkeypatch, "train_one", 0, tiny_runs.ask_to_stop)
  assert main.main(argv("run")) == 75
  assert main.main(argv("run")) == 0
  one, other = tmp_path / "run", tmp_path / "whole"
  assert tiny_runs.repeatable(one) == tiny_runs.repeatable(other)
  assert tiny_runs.files(one / "model") == tiny_runs.files(other / "model")
  model = rspo_jax.load_model(one / "model", "bfloat16")
  state = tiny_runs.newest(one, tiny_runs.program_of(argv("run"))).state
  assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"bfloat16"}
  jax.tree.map(np.testing.assert_array_equal, model.params, state.params)


def test_supervised_steps_lower_the_loss(whole_supervised):
  rows = tiny_runs.rows(whole_supervised)[1:]
  assert rows[-1]["loss"] < rows[0]["loss"] - 0.003
  # cosine, from the peak down to 0
  rates = [row["lr"] for row in rows]
  expected = [
    4e-3 * (1 + math.cos(math.pi * i / STEPS)) / 2 for i in range(STEPS)
  ]
  np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_sigterm_ends_a_process_with_75_and_the_same_command_goes_on(
  whole, tiny, tmp_path, program
):
  argv = tiny(tmp_path / "run")
  process = subprocess.Popen(
    [sys.executable, "-m", "rspo_jax.main", *argv[1:]],
    cwd=ROOT,
    env=tiny_runs.environment(),
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:
    for line in process.stdout:
      if line.startswith("compiling rollout"):
        process.send_signal(signal.SIGTERM)
        break
    rest = process.stdout.read()
  assert process.returncode == 75, rest
  assert "SIGTERM" in rest
  # The step was given up: nobody waits for a compilation.
  assert [row["step"] for row in tiny_runs.rows(tmp_path / "run")] == [0]
  assert main.main(argv) == 0
  tiny_runs.assert_same_run(tmp_path / "run", whole, program)


# Damage and faults.


def test_a_damaged_checkpoint_is_passed_over_and_said(
  whole, tiny, tmp_path, monkeypatch, program, capsys
):
  tiny_runs.disturb(monkeypatch, "train_one", 4, tiny_runs.crash)
  with pytest.raises(tiny_runs.CrashError):
    main.main(tiny(tmp_path))
  damage(tmp_path / "checkpoints" / "step_00000004")
  assert main.main(tiny(tmp_path)) == 0
  assert "step_00000004" in capsys.readouterr().out
  tiny_runs.assert_same_run(tmp_path, whole, program)


def damage(checkpoint):
  """Flips a bit in the largest file of a checkpoint."""
  path = max(checkpoint.rglob("*"), key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_a_run_without_any_good_checkpoint_stops_with_3(
  tiny, tmp_path, monkeypatch, capsys
):
  tiny_runs.disturb(monkeypatch, "train_one", 3, tiny_runs.crash)
  with pytest.raises(tiny_runs.CrashError):
    main.main(tiny(tmp_path))
  damage(tmp_path / "checkpoints" / "step_00000002")
  before = tiny_runs.files(tmp_path)
  capsys.readouterr()
  assert main.main(tiny(tmp_path)) == 3
  assert "Move the folder away" in capsys.readouterr().err
  assert tiny_runs.files(tmp_path) == before


def test_a_value_that_is_not_finite_stops_with_3_and_names_it(
  whole, tiny, tmp_path, monkeypatch, program, capsys
):
  original, left = Run.train_one, ["loss"]

  def poisoned(run, batches):
    values = original(run, batches)
    return values | ({left.pop(): math.nan} if run.step == 3 and left else {})

  monkeypatch.setattr(Run, "train_one", poisoned)
  assert main.main(tiny(tmp_path)) == 3
  assert "Step 3 is not finite: loss = nan" in capsys.readouterr().err
  assert tiny_runs.newest(tmp_path, program).step == 2
  assert main.main(tiny(tmp_path)) == 0
  tiny_runs.assert_same_run(tmp_path, whole, program)


@pytest.mark.parametrize(
  ("error", "said"),
  [
    (OSError(28, "No space left on device"), "No space left"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"), "micro_batch"),
  ],
)
def test_a_full_disk_or_memory_stops_with_3(
  error, said, whole, tiny, tmp_path, monkeypatch, program, capsys
):
  def fail(run):
    raise error

  tiny_runs.disturb(monkeypatch, "train_one", 3, fail)
  assert main.main(tiny(tmp_path)) == 3
  assert said in capsys.readouterr().err
  assert main.main(tiny(tmp_path)) == 0
  tiny_runs.assert_same_run(tmp_path, whole, program)


# Other devices and processes.

DEVICES = """
import json, sys
import tiny_runs
from rspo_jax import main
with tiny_runs.quick():
  sys.exit(max(main.main(argv) for argv in json.loads(sys.argv[1])))
"""
# Nothing is dropped: scores are computed while rewards are.
KEPT = {"objective__skip_equal_groups": False, "run__steps": 3}


@pytest.fixture(scope="module")
def eight_devices(tiny, tmp_path_factory):
  """Folders of three whole runs, made on 8 virtual devices."""
  folder = tmp_path_factory.mktemp("eight")
  argvs = [
    tiny(folder / "run", cache=""),
    tiny(folder / "kept", cache="", **KEPT),
    tiny(folder / "supervised", cache="", **supervised()),
  ]
  subprocess.run(
    [sys.executable, "-c", DEVICES, json.dumps(argvs)],
    cwd=ROOT,
    env=tiny_runs.environment(
      XLA_FLAGS="--xla_force_host_platform_device_count=8",
      PYTHONPATH=str(pathlib.Path(__file__).parent),
    ),
    check=True,
    stdout=subprocess.DEVNULL,
  )
  return folder


def test_eight_devices_give_the_run_of_one(
  eight_devices, whole, whole_kept, whole_supervised
):
  tiny_runs.assert_agrees(eight_devices / "run", whole)
  tiny_runs.assert_agrees(eight_devices / "kept", whole_kept)
  tiny_runs.assert_agrees(eight_devices / "supervised", whole_supervised)


def test_a_run_of_eight_devices_goes_on_with_one(eight_devices, tiny, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(eight_devices / "run", folder)
  (folder / "summary.json").unlink()
  for step in (4, 5):
    shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")
  # From the checkpoint of step 2, so that step 3 is the first of one device.
  # Later ones are not compared: under random weights near-ties are frequent,
  # and the first that falls the other way changes a sample (at step 4 it did).
  assert main.main(tiny(folder)) == 0
  tiny_runs.assert_agrees(folder, eight_devices / "run")
