"""Rollouts one step behind: whose completions they are, and that none is lost."""

import functools
import json
import types

import numpy as np
import pytest
import tiny_runs

from rspo_jax import main
from rspo_jax.algorithm import streams
from rspo_jax.devices import sharding
from rspo_jax.run import loop, scoring
from rspo_jax.run import program as program_lib
from rspo_jax.run import step as step_lib

STEPS = tiny_runs.SMALL["run.steps"]
RSPO = {"rollout__stale_steps": 1, "run__checkpoint_every": 1}
RSPO |= {"run__keep_checkpoints": STEPS}
# A ratio, several updates, groups dropped, two passes.
ESPO = RSPO | {
  "objective__name": "espo",
  "objective__kl_weight": 0.1,
  "objective__skip_equal_groups": True,
  "train__updates_per_rollout": 2,
  "train__passes": "two",
}
# A ratio and nothing more.
GDPO = RSPO | {"objective__name": "gdpo", "objective__clip": 0.5}
CASES = {"rspo": RSPO, "espo": ESPO, "gdpo": GDPO}

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
  """Folder of an undisturbed run of each case, made when it is asked for."""

  @functools.cache
  def made(name):
    folder = tmp_path_factory.mktemp(name) / "run"
    with tiny_runs.quick():
      assert main.main(tiny(folder, **CASES[name])) == 0
    return folder

  return made


def kept(folder, program, step):
  """(state of a step, what waits for the next one)."""
  if not step:
    return program_lib.fresh_state(program), None
  arrays = tiny_runs.checkpoint(folder, program, step).state
  return arrays["train"], arrays["ahead"]


def run_of(program):
  """As much of a run as its batches need."""
  split = sharding.split(program.mesh, program.settings.rollout.prompts)
  return types.SimpleNamespace(
    settings=program.settings, program=program, split=split
  )


def shown(folder, step):
  """Prompts and completions of the rollout of a step, as samples/ has them."""
  path = folder / "samples" / f"train-{step + 1:06d}.jsonl"
  rows = [json.loads(line) for line in path.open()]
  return [(row["prompt"], row["completion"]) for row in rows]


def sampled_by(program, params, step):
  """The same, sampled here."""
  settings = program.settings
  batch = loop.open_batches(run_of(program))[step]
  key = streams.stream_key(settings.run.seed, step, streams.ROLLOUT)
  out = program.rollout_fn(
    program.policy(params), batch.tokens, batch.mask, key
  )
  ended = np.asarray(out.completion_mask)
  tokens = np.asarray(out.tokens)[:, -ended.shape[1] :]
  texts = program.to_text(tokens, ended)
  size = settings.rollout.group_size
  prompts = [
    program.prompt(batch.examples[i // size]) for i in range(len(texts))
  ]
  return list(zip(prompts, texts, strict=True))


def test_the_first_step_is_that_of_a_run_on_policy(runs, whole):
  one, other = tiny_runs.repeatable(runs("rspo")), tiny_runs.repeatable(whole)
  assert one[:2] == other[:2]
  for step, same in ((0, True), (1, False)):
    assert (shown(runs("rspo"), step) == shown(whole, step)) == same


def test_completions_are_those_of_the_parameters_before_the_last_update(
  runs, tiny
):
  folder = runs("rspo")
  program = tiny_runs.program_of(tiny("unused", **RSPO))
  states = [kept(folder, program, step)[0] for step in range(STEPS)]
  own = []
  for step in range(STEPS - 1):
    expected = shown(folder, step + 1)
    assert sampled_by(program, states[step].params, step + 1) == expected
    own.append(sampled_by(program, states[step + 1].params, step + 1))
  assert own != [shown(folder, step + 1) for step in range(STEPS - 1)]


@pytest.mark.parametrize("name", ["espo", "gdpo"])
def test_ratios_are_to_the_parameters_that_sampled(name, runs, tiny):
  folder = runs(name)
  program = tiny_runs.program_of(tiny("unused", **CASES[name]))
  seed = program.settings.run.seed
  for step in (1, 3):
    before, _ = kept(folder, program, step - 1)
    state, ahead = kept(folder, program, step)
    assert len(ahead["old"]) == program.settings.step.updates_per_rollout
    batch = scoring.unjudged_batch(run_of(program), ahead["completions"])
    for update, old in enumerate(ahead["old"]):
      own = streams.mask_key(seed, step, update)
      expected = program.estimate_fn(before.params, batch, own)
      np.testing.assert_array_equal(old, expected)
      assert (old != program.estimate_fn(state.params, batch, own)).any()
  assert kept(folder, program, STEPS)[1] is None


def test_the_first_ratio_is_one_and_later_ones_are_not(runs):
  rows = tiny_runs.rows(runs("gdpo"))
  assert rows[1]["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
  for row in rows[2:]:
    assert abs(row["ratio/mean"] - 1.0) > 1e-4


def test_scores_of_older_parameters_cover_all_and_are_counted(runs):
  for row in tiny_runs.rows(runs("espo"))[1:]:
    kept_share = row["update/kept_share"]
    # Of two masks: reference and policy of two updates, and the older policy's.
    expected = 2 * ((2 + 2) * kept_share + 2)
    assert row["compute/score"] == pytest.approx(expected)


CUTS = [
  ("train", 0, "stop"),
  ("stop_if_asked", 0, "stop"),
  ("train", 2, "stop"),
  ("stop_if_asked", 2, "stop"),
  # The rollout of the step after it is under way.
  ("sample", 3, "stop"),
  ("train", 3, "crash"),
  ("update", 3, "crash"),
  ("evaluate", 4, "stop"),
]


@pytest.mark.parametrize(
  ("name", "method", "step", "action"),
  [*(("rspo", *cut) for cut in CUTS), *(("espo", *cut) for cut in CUTS[3:7])],
)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
  name, method, step, action, runs, tiny, tmp_path, monkeypatch
):
  whole, argv = runs(name), tiny(tmp_path / "run", **CASES[name])
  act = {"stop": tiny_runs.ask_to_stop, "crash": tiny_runs.crash}[action]
  tiny_runs.disturb(monkeypatch, method, step, act)
  if action == "crash":
    with pytest.raises(tiny_runs.CrashError):
      main.main(argv)
  else:
    assert main.main(argv) == 75
  assert main.main(argv) == 0
  program = tiny_runs.program_of(argv)
  tiny_runs.assert_same_run(tmp_path / "run", whole, program)


def test_a_run_that_is_stopped_at_every_step_arrives_all_the_same(
  runs, tiny, tmp_path, monkeypatch
):
  whole, argv = runs("espo"), tiny(tmp_path, **ESPO)
  for step in range(STEPS):
    tiny_runs.disturb(monkeypatch, "train", step, tiny_runs.ask_to_stop)
    assert main.main(argv) == 75
  assert main.main(argv) == 0
  tiny_runs.assert_same_run(tmp_path, whole, tiny_runs.program_of(argv))


def test_the_next_rollout_is_begun_before_the_rewards(
  runs, tiny, tmp_path, monkeypatch
):
  runs("rspo")  # compiled by then
  names = ("sample", "wait_for_rollout", "update")
  events = tiny_runs.noted(
    monkeypatch,
    rewards=(program_lib.Program, "judge"),
    score=(scoring, "score"),
    **{name: (step_lib, name) for name in names},
  )
  short = {"run__steps": 3, "eval__every": 0}
  assert main.main(tiny(tmp_path / "run", **RSPO | short)) == 0
  first = events.index("sample")
  last = len(events) - events[::-1].index("update")
  wait = "wait_for_rollout"
  own = ["sample", wait]
  middle = ["sample", "rewards", wait, "score", "update"]
  final = [wait, "rewards", "score", "update"]
  expected = [*own, *middle, wait, *middle, *final]
  assert events[first:last] == expected


def test_a_checkpoint_is_evaluated_and_goes_on_with_or_without_what_waits(
  tiny, tmp_path, monkeypatch, capsys
):
  argv = tiny(tmp_path / "run", **RSPO)
  tiny_runs.disturb(monkeypatch, "train", 2, tiny_runs.ask_to_stop)
  assert main.main(argv) == 75
  on_policy = tiny(
    tmp_path / "run",
    **RSPO | {"rollout__stale_steps": 0, "run__accept_changes": True},
  )
  for command in (argv, on_policy):
    capsys.readouterr()
    assert main.main([*command, "--mode=eval"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
  assert main.main(on_policy) == 0
  program = tiny_runs.program_of(on_policy)
  state, _ = kept(tmp_path / "run", program, 2)
  assert shown(tmp_path / "run", 2) == sampled_by(program, state.params, 2)
