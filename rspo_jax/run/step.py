"""A step: sample -> judge -> batch -> score -> update.

Prompts -> rollout (device) -> text, verdicts, advantages, targets (host) ->
batch, scores of the reference (device) -> update (device). Scores that need no
reward are dispatched before the host starts to verify, unless dropped groups
make waiting cheaper. A supervised step puts demonstrations in the place of
rollouts; the rest is the same code.
"""

import contextlib
import dataclasses
import time

import jax
import numpy as np

from rspo_jax.algorithm import advantages, objectives, streams
from rspo_jax.algorithm.types import RolloutBatch
from rspo_jax.devices import sharding
from rspo_jax.run import incident, records, rollout, scoring
from rspo_jax.run.runs import Run
from rspo_jax.run.state import Sampled


@dataclasses.dataclass
class Stopwatch:
  """Seconds of the phases of a step.

  `overlapped_s` of them were the host's while the device worked, too.
  """

  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  overlapped_s: float = 0.0

  @contextlib.contextmanager
  def __call__(self, name: str):
    start = time.perf_counter()
    yield
    elapsed = time.perf_counter() - start
    self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

  def host_share(self, step_s: float) -> float:
    """Share of a step in which the device waited for the host, at most.

    Where the device was done with the early scores before the host was done
    with the rewards, all of the host's time counts.
    """
    busy_s = self.overlapped_s
    for name in ("rollout", "score", "update"):
      busy_s += self.seconds.get(f"time/{name}_s", 0.0)
    return max(0.0, 1.0 - busy_s / step_s)


@dataclasses.dataclass
class Made:
  """What a step learns from.

  Attributes:
    batch: of the step.
    values: metrics so far.
    scores: of the batch, for each update; None: still to be computed.
    following: the rollout of the step after this one, where it is done.
  """

  batch: RolloutBatch
  values: dict[str, float]
  scores: list[scoring.Scores] | None = None
  following: Sampled | None = None


def train(run: Run, batches) -> dict[str, float]:
  """One step; returns its metrics as floats.

  Raises:
    Interrupted: a signal came; the state is that before the step.
  """
  start, compiled_s = time.perf_counter(), run.compiling_s
  watch = Stopwatch()
  make = demonstrate if run.settings.supervised else roll_out
  made = make(run, batches, watch)
  with watch("time/score_s"):
    scores = made.scores or scoring.score(run, made.batch)
    scoring.check_start(run, made.batch, scores[0].reference)
    jax.block_until_ready([vars(each) for each in scores])
  with watch("time/update_s"):
    updates = [update(run, made.batch, one, i) for i, one in enumerate(scores)]
  if samples_due(run):
    with watch("time/samples_s"):
      records.keep_calibration(run, made.batch, updates[0][1])
  metrics = [values for values, _ in updates]
  scoring.check_first_update(run, metrics[0])
  values = settle(run, made, scores, metrics)
  run.amid_updates = False
  values |= watch.seconds
  values["time/step_s"] = time.perf_counter() - start
  spent = {k: v for k, v in values.items() if k.startswith("time/")}
  values["time/host_share"] = watch.host_share(values["time/step_s"])
  spent["first_calls"] = run.compiling_s - compiled_s
  for key, value in spent.items():
    run.state.count_seconds(key, value)
  return values


def samples_due(run: Run) -> bool:
  """Whether the step in progress leaves samples."""
  every = run.settings.run.samples_every
  return bool(every) and (run.state.step + 1) % every == 0


# Sample.


def rollout_key(run: Run, step: int) -> jax.Array:
  """Key of a step's rollout."""
  return streams.stream_key(run.settings.run.seed, step, streams.ROLLOUT)


def sample(run: Run, batches, step: int, watch: Stopwatch) -> Sampled:
  """Begins the rollout of a step, by the parameters as they stand."""
  program = run.program
  with watch("time/data_s"):
    prompts = batches[step]
  with watch("time/rollout_s"):
    start = time.perf_counter()
    tokens, mask = sharding.put_global(
      program.mesh, (prompts.tokens, prompts.mask)
    )
    params = program.for_sampling(run.policy)
    out = program.rollout_fn(params, tokens, mask, rollout_key(run, step))
    del params  # a second copy, where sampling has its own layout
  return Sampled(step, prompts, out, start)


def wait_for_rollout(run: Run, sampled: Sampled, watch: Stopwatch) -> None:
  """Waits for a rollout; the policy's parameters are still its own."""
  if sampled.seconds is not None:
    return
  plan = run.settings.scores
  with watch("time/rollout_s"):
    out = jax.block_until_ready(sampled.completions)
    sampled.seconds = time.perf_counter() - sampled.begun_s
  if plan.ratio == "sampler":
    with watch("time/score_s"):
      batch = scoring.unjudged_batch(run, out)
      sampled.old = [
        scoring.scores_under(run, run.policy, batch, update, sampled.step)
        for update in range(plan.updates)
      ]
      jax.block_until_ready(sampled.old)


def roll_out(run: Run, batches, watch: Stopwatch) -> Made:
  """Samples, judges and makes one batch.

  When its scores are computed (`ScorePlan`), and what the device does while
  the host verifies:

  | case                       | meanwhile          | scores               |
  |----------------------------|--------------------|----------------------|
  | no group can be dropped    | scores             | here, before rewards |
  | groups can be dropped      | nothing            | by `train`, after    |
  | rollouts one step behind   | the next rollout   | by `train`, after    |
  | the same, with a ratio     | the next rollout   | here, after; those of |
  |                            |                    | the older parameters |
  |                            |                    | came with the rollout |
  """
  program, settings, state = run.program, run.settings, run.state
  sampled = state.ahead or sample(run, batches, state.step, watch)
  prompts, out = sampled.prompts, sampled.completions
  wait_for_rollout(run, sampled, watch)
  with watch("time/rollout_s"):
    tokens = sharding.local_rows(out.tokens)
    ended = sharding.local_rows(out.completion_mask)
  run.stop_if_asked()
  scores = following = None
  if settings.rollout.stale_steps:
    # The device has this to do while the host verifies. Scores wait for it,
    # so that no two programs take room at a time.
    if state.step + 1 < settings.run.steps:
      following = sample(run, batches, state.step + 1, watch)
  elif settings.scores.early:
    # Nothing about these scores depends on the rewards: the device works on
    # them while the host verifies.
    scores = scoring.score(run, scoring.unjudged_batch(run, out))
  with watch("time/reward_s"):
    judged = judge(run, prompts, tokens, ended)
  finished, forwards = finish_partial(run, prompts, out, watch)
  under_way = [vars(each) for each in scores or ()]
  if following is not None:
    under_way = following.completions.tokens
  wait_for_device(jax.tree.leaves(under_way), watch)
  run.stop_if_asked()
  if following is not None:
    wait_for_rollout(run, following, watch)
  with watch("time/reward_s"):
    outcomes = gather(run, tokens, ended, judged)
    found = find(run, outcomes, finished)
  values = rollout.metrics(outcomes)
  values |= cut_prompts(run, prompts)
  values["rollout/denoiser_calls"] = int(out.denoiser_calls)
  values["compute/rollout"] = float(out.forwards) + forwards
  values["rollout/tokens_per_s"] = out.completion_mask.size / sampled.seconds
  if samples_due(run):
    records.keep_samples(run, prompts, judged, out, outcomes.rewards)
  batch = program.batch_fn(out, found)
  if sampled.old:
    old = [program.reorder_fn(one, batch) for one in sampled.old]
    scores = scoring.score(run, batch, old)
  return Made(batch, values, scores, following)


def wait_for_device(under_way: list[jax.Array], watch: Stopwatch) -> None:
  """Waits for what the device did while the host verified.

  What the processes gather next is behind it on the device.
  """
  if not all(x.is_ready() for x in under_way):
    watch.overlapped_s = watch.seconds["time/reward_s"]
  with watch("time/score_s"):
    jax.block_until_ready(under_way)


def demonstrate(run: Run, batches, watch: Stopwatch) -> Made:
  """A batch of demonstrations in the place of a rollout."""
  program = run.program
  with watch("time/data_s"):
    demonstrations = batches[run.state.step]
  completion = demonstrations.completion
  tokens = np.concatenate([demonstrations.tokens, completion], axis=1)
  seen = np.concatenate(
    [demonstrations.mask, np.ones(completion.shape, bool)], axis=1
  )
  ends = completion == program.model.config.eos_id
  through_end = np.cumsum(ends, axis=1) - ends == 0
  out = rollout.Completions(
    *sharding.put_global(program.mesh, (tokens, seen, through_end)), None, None
  )
  found = rollout.before_rewards(run.split.size, 1)
  found = found.replace(advantage=np.ones_like(found.advantage))
  batch = program.batch_fn(out, found)
  return Made(batch, cut_prompts(run, demonstrations))


def cut_prompts(run: Run, prompts) -> dict[str, int]:
  """How many prompts of a batch lost their beginning, where they may."""
  if run.settings.data.long_prompts == "refuse":
    return {}
  everyone = sharding.gather_json([int(prompts.cut[run.split.own].sum())])
  return {"data/cut_prompts": sum(everyone)}


# Judge.


def judge(run: Run, prompts, tokens, ended) -> rollout.Judged:
  """Verdicts of this process's own completions.

  Args:
    run: whose step it is.
    prompts: that this process holds, a batch of data.py.
    tokens: i32 [n, S] that it holds.
    ended: bool [n, L], True through the first EOS.
  """
  split, program = run.split, run.program
  own = sharding.repeated(split.own, run.settings.rollout.group_size)
  texts = program.to_text(tokens[own, -ended.shape[1] :], ended[own])
  return program.judge([prompts.examples[i] for i in split.own], texts)


def finish_partial(run: Run, prompts, out, watch: Stopwatch):
  """Rewards of completions of partial canvases, where an objective asks.

  One forward of the schedule is drawn for the whole step. Completing them
  counts as rollout, judging them as reward.

  Returns:
    (rewards f32 [F, n] of this host's own or None, forwards they took).
  """
  settings = run.settings
  objective = settings.objective
  if not objectives.OBJECTIVES[objective.name].finishes:
    return None, 0.0
  *keys, drawn = streams.finish_keys(
    rollout_key(run, run.state.step), objective.sapo.finishes + 1
  )
  forward = jax.random.randint(drawn, (), 1, settings.sampler.steps)
  rewards, forwards = [], 0.0
  for key in keys:
    with watch("time/rollout_s"):
      done = run.program.finish_fn(run.policy, out, forward, key)
      ended = sharding.local_rows(done.completion_mask)
      tokens = sharding.local_rows(done.tokens)
    with watch("time/reward_s"):
      rewards.append(judge(run, prompts, tokens, ended).rewards)
    forwards += float(done.forwards)
  return np.stack(rewards), forwards


def gather(run: Run, tokens, ended, judged) -> rollout.Outcomes:
  """What all processes found of the completions of a rollout."""
  group = run.settings.rollout.group_size
  own = sharding.repeated(run.split.own, group)
  completions = tokens[own, -ended.shape[1] :]
  has_eos = (completions == run.program.model.config.eos_id).any(1)
  return rollout.gather(run.split, judged, ended[own], has_eos, group)


def find(run: Run, outcomes: rollout.Outcomes, finished) -> rollout.Findings:
  """Advantages, targets and what is kept, the same on all processes.

  `finished` is as `finish_partial` gave it.
  """
  settings = run.settings
  if finished is not None:
    finished = rollout.gather_finished(
      run.split, finished, settings.rollout.group_size
    )
  found = objectives.rollout_advantages(
    outcomes.rewards,
    outcomes.correct,
    settings.objective,
    settings.rollout.keep_groups,
    finished,
  )
  return rollout.findings(
    found,
    run.state.lambda_,
    settings.step.shards,
    drop=settings.objective.skip_equal_groups,
  )


# Update.


def update(run: Run, batch, scores: scoring.Scores, index: int):
  """One of a step's updates; returns its metrics and its calibration."""
  plan, state = run.settings.scores, run.state
  policy = scores.policy if plan.two_passes else None
  if plan.policy_again(index):
    policy = scoring.scores_under(run, run.policy, batch, index)
  state.train, values, compared = run.program.update_fn(
    state.train,
    batch,
    state.lambda_,
    scoring.mask_key(run, index),
    scores.reference,
    policy,
    scores.old,
    run.program.frozen,
  )
  run.amid_updates = True
  return {k: float(v) for k, v in jax.device_get(values).items()}, compared


def settle(run: Run, made: Made, scores, updates) -> dict[str, float]:
  """The state after a step's updates; returns the step's metrics.

  Args:
    run: whose step it is.
    made: what it learned from.
    scores: of its batch.
    updates: metrics of each update.
  """
  settings, state = run.settings, run.state
  state.step += 1
  state.ahead = made.following
  values = {k: sum(u[k] for u in updates) / len(updates) for k in updates[0]}
  values |= {"lr": updates[-1]["lr"]} | made.values
  cost = count_compute(run, values)
  bad = incident.not_finite(values)
  values |= state.tally.count(bad, values, cost)
  if bad:
    records.write_incident(run, bad, values, made.batch, scores)
    return values
  objective = settings.objective
  if objective.lambda_share and values["update/applied"]:
    state.lambda_ = advantages.follow_share(
      state.lambda_, values["gap/lambda_share"], objective
    )
  every = objective.reference_every
  if every and state.step % every == 0:
    state.train = run.program.refresh_fn(state.train)
  window = settings.run.collapse_window
  for warning in state.watch.see(values, window, settings.rollout.group_size):
    run.writer.warn(f"Step {state.step}: {warning}")
  return values


def count_compute(run: Run, values) -> float:
  """Adds what a step has cost, in forwards of one whole sequence.

  A backward pass counts two. `compute/forward_equivalents` is per completion
  of the rollout; `compute/cumulative` sums over completions and steps, and the
  step's part of it is returned.
  """
  plan, kept = run.settings.scores, values["update/kept_share"]
  values["compute/score"] = plan.score_forwards(kept)
  values["compute/update"] = plan.update_forwards(kept)
  values["compute/forward_equivalents"] = (
    values.get("compute/rollout", 0.0)
    + values["compute/score"]
    + values["compute/update"]
  )
  rollout_settings = run.settings.rollout
  sequences = rollout_settings.prompts * rollout_settings.group_size
  before = run.state.computed
  run.state.computed += sequences * values["compute/forward_equivalents"]
  values["compute/cumulative"] = run.state.computed
  return run.state.computed - before
