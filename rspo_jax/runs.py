"""One run: its state, its evaluations, its steps.

A step of reinforcement learning, in order: prompts -> rollout (device) ->
text, verdicts, advantages, targets (host) -> reference scores (device) ->
update (device). Scores that need no reward are dispatched before the host
starts to verify, unless dropped groups make waiting cheaper. A supervised step
puts demonstrations in the place of rollouts; the rest is the same code.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rspo_jax import (
  collapse,
  data,
  evaluate,
  incident,
  metrics,
  mirror,
  objectives,
  records,
  rollout,
  scores,
  sharding,
  traces,
  train_step,
)
from rspo_jax import program as program_lib
from rspo_jax import settings as settings_lib
from rspo_jax.interrupt import Interrupt
from rspo_jax.models import hf_adapters, hf_weights

# Nats per token between policy and reference before anything was learnt.
START_TOLERANCE = 1e-6


class Interrupted(Exception):
  """A signal came amid an evaluation or a step, which is given up."""


def evaluation_prompts(
  program: program_lib.Program, split: str, count: int
) -> evaluate.Prompts:
  """The first `count` prompts of a split (0: all), tokenised."""
  settings = program.settings
  examples = data.load_examples(program.task, split, settings.data)
  if count:
    examples = examples[:count]
  tokens, mask, cut = data.encode_prompts(
    examples,
    program.prompt,
    program.model.tokenizer.encode,
    settings.prompt_length,
    program.model.config.pad_id,
    settings.long_prompts,
  )
  return evaluate.Prompts(tokens, mask, examples, int(cut.sum()))


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
class Sampled:
  """A rollout, done or under way.

  Attributes:
    step: whose completions they are.
    prompts: of this process, a batch of data.py.
    completions: `rollout.Completions`.
    begun_s: clock when it was dispatched; None: by an earlier process.
    seconds: until it was seen to be done; None: it was not yet.
    old: where ratios are to parameters of the step before, values of the
      completions under them for each of the step's updates, in the rollout's
      order.
  """

  step: int
  prompts: Any
  completions: rollout.Completions
  begun_s: float | None = None
  seconds: float | None = None
  old: list[jax.Array] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Scores:
  """Values of a batch for one update, from `estimate`.

  Attributes:
    reference: under the reference; None where it is not used.
    policy: under the policy, for the update's two passes; else None.
    old: under the parameters of the rollout, for ratios; else None.
  """

  reference: Any
  policy: Any
  old: Any

  @property
  def arrays(self) -> list[jax.Array]:
    """Those that there are."""
    return jax.tree.leaves((self.reference, self.policy, self.old))


def mean_of_updates(updates: list[dict[str, float]]) -> dict[str, float]:
  """Metrics of a step's updates as one row: means, and the last rate."""
  values = {k: sum(u[k] for u in updates) / len(updates) for k in updates[0]}
  return values | {"lr": updates[-1]["lr"]}


class Run:
  """One run in its folder: the loop's state and what it writes.

  `workdir` is the folder on this machine; `home` knows the one in a bucket,
  if that is where the run lives.
  """

  def __init__(
    self,
    program: program_lib.Program,
    home: mirror.Home,
    writer: metrics.MetricsWriter,
    interrupt: Interrupt,
    config: dict[str, Any],
  ):
    self.program = program
    self.settings = program.settings
    self.home = home
    self.workdir = home.local
    self.writer = writer
    self.interrupt = interrupt
    self.config = config
    self.main_process = jax.process_index() == 0
    self.state = None
    self.step = 0
    self.saved_step = -1  # step of the newest save, under way or done
    self.amid_updates = False  # the state is between that of two steps
    self.ahead: Sampled | None = None  # of the next step, where it is done
    self.following: Sampled | None = None  # of the step after the present one
    self.tally = incident.Tally()
    self.watch = collapse.Watch()
    self.seconds: dict[str, float] = {}
    self.computed = 0.0  # forwards of one whole sequence, since the start
    self.lambda_ = self.settings.objective.lambda_
    self.first_eval: dict[str, float] = {}
    self.last_eval: dict[str, float] = {}
    self.by_difficulty: list[dict[str, Any]] = []
    self.greedy_rows: list[dict[str, Any]] = []  # of the last evaluation
    self._evaluation_fns: dict[Any, Any] = {}
    self.split = sharding.split(program.mesh, self.settings.rollout.prompts)
    self.eval_prompts = evaluation_prompts(
      program, self.settings.eval.split, self.settings.eval.prompts
    )
    self.compiling_s = 0.0  # first calls, this process's
    self._seen: set[str] = set()

  @property
  def saved(self):
    """The state as checkpoints have it, with what waits for the next step."""
    if self.ahead is None:
      return self.state
    return self.state.replace(
      ahead={"completions": self.ahead.completions, "old": self.ahead.old}
    )

  @property
  def policy(self):
    """The policy's parameters, as the jitted functions take them."""
    return self.program.policy(self.state.params)

  def call(self, name: str, fn, *args):
    """Calls a jitted function; its first call is shown as compilation."""
    with contextlib.ExitStack() as stack:
      stack.enter_context(self.program.mesh)
      stack.enter_context(nn.logical_axis_rules(sharding.RULES))
      if name not in self._seen:
        # Nobody can break a compilation off: the last moment to do without.
        self.stop_if_asked()
        self._seen.add(name)
        stack.enter_context(self.writer.phase(f"compiling {name}"))
        saved = self.step in (0, self.saved_step) and not self.amid_updates
        if saved and jax.process_count() == 1:
          stack.enter_context(self.interrupt.expendable())
        start = time.perf_counter()
        out = jax.block_until_ready(fn(*args))
        self.compiling_s += time.perf_counter() - start
        return out
      return fn(*args)

  # Evaluation.

  def evaluate(
    self,
    stem: pathlib.Path,
    evaluation: settings_lib.Evaluation | None = None,
  ) -> dict[str, float]:
    """Greedy and sampled evaluation; completions go to STEM-<kind>.jsonl.

    Args:
      stem: folder and beginning of the files' names.
      evaluation: one of --mode=eval; None: as during training.

    Raises:
      Interrupted: a signal came.
    """
    settings, program = self.settings, self.program
    decodings = {
      "greedy": (program.greedy_fn, 1),
      "sampled": (program.sampled_fn, settings.eval.samples),
    }
    label, seed = "", settings.run.seed
    if evaluation is not None:
      label = f"{scores.sampler_name(evaluation.greedy)}, "
      label += f"{evaluation.greedy.completion_length} tokens, "
      seed = evaluation.seed
      decodings = {
        kind: (self.evaluation_fn(getattr(evaluation, kind)), samples)
        for kind, (_, samples) in decodings.items()
      }
    # Before the first step the policy is the model as it was loaded.
    params = program.for_sampling(
      program.params if self.state is None else self.policy
    )
    results = {}
    for kind, (fn, samples) in decodings.items():
      name = f"{label}{kind} evaluation"
      results[kind] = evaluate.run(
        functools.partial(self.call, name, fn),
        params,
        self.eval_prompts,
        settings.eval.batch,
        program.mesh,
        seed,
        program.judge,
        program.to_text,
        self.stop_if_asked,
        samples=samples,
        warm=name in self._seen,
        denoising=functools.partial(traces.denoising_rows, program.pieces),
      )
      self.write_rows(
        stem.with_name(f"{stem.name}-{kind}.jsonl"),
        (
          {"prompt": self.prompt_text(row["index"])} | row
          for row in results[kind].rows
        ),
      )
    values = evaluate.metrics(results["greedy"], results["sampled"])
    if settings.long_prompts == "keep_tail":
      values["eval/cut_prompts"] = self.eval_prompts.cut
    self.first_eval = self.first_eval or values
    self.last_eval = values
    self.greedy_rows = results["greedy"].rows
    self.by_difficulty = evaluate.by_difficulty(
      [program.task.difficulty(e) for e in self.eval_prompts.examples]
      if program.task.difficulty
      else [],
      results["greedy"],
      results["sampled"],
    )
    self.writer.table(
      scores.decodings(values),
      title=f"{settings.eval.split} at step {self.step}, "
      f"n = {values['eval/n']}",
    )
    self.writer.table(scores.passes(values))
    # Not between the steps of a run, which has other things to say.
    if evaluation is not None or self.step == settings.run.steps:
      self.writer.table(scores.difficulties(self.by_difficulty))
    return values

  def evaluation_fn(self, sampling):
    """The compiled function of an evaluation's sampler, made once."""
    program = self.program
    for known, fn in (
      (self.settings.greedy, program.greedy_fn),
      (self.settings.sampled, program.sampled_fn),
      *self._evaluation_fns.items(),
    ):
      if known == sampling:
        return fn
    fn = self._evaluation_fns[sampling] = program.sampling(sampling, 1)
    return fn

  def stop_if_asked(self, *_) -> None:
    """Gives an evaluation or a step up; all processes do or none."""
    if not self.amid_updates and self.interrupt.agreed(self.step):
      raise Interrupted

  def prompt_text(self, index: int) -> str:
    """Text of an evaluation prompt."""
    return self.program.prompt(self.eval_prompts.examples[index])

  def write_rows(self, path: pathlib.Path, rows) -> None:
    """Completions with verdicts as JSON lines, by the main process."""
    if not self.main_process:
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
      for row in rows:
        file.write(json.dumps(row) + "\n")

  # Steps.

  def demonstration_batch(self, batches, watch):
    """A batch of demonstrations in the shape of a rollout."""
    program = self.program
    with watch("time/data_s"):
      batch = batches[self.step]
    n, length = batch.completion.shape
    tokens = np.concatenate([batch.tokens, batch.completion], axis=1)
    seen = np.concatenate([batch.mask, np.ones((n, length), bool)], axis=1)
    ends = batch.completion == program.model.config.eos_id
    scored, seen = rollout.scope_masks(
      np.cumsum(ends, axis=1) - ends == 0, seen, self.settings.likelihood.scope
    )
    ones = np.ones(n, np.float32)
    host = train_step.RolloutBatch(
      tokens, seen, scored, ones, np.zeros_like(ones), ones
    )
    return sharding.put_global(program.mesh, host), self.cut_prompts(batch)

  def cut_prompts(self, batch) -> dict[str, int]:
    """How many prompts of a batch lost their beginning, where they may."""
    if self.settings.long_prompts == "refuse":
      return {}
    everyone = sharding.gather_json([int(batch.cut[self.split.own].sum())])
    return {"data/cut_prompts": sum(everyone)}

  def sample(self, batches, step: int, watch) -> Sampled:
    """Begins the rollout of a step, by the parameters as they stand."""
    program = self.program
    with watch("time/data_s"):
      prompts = batches[step]
    with watch("time/rollout_s"):
      start = time.perf_counter()
      tokens, mask = sharding.put_global(
        program.mesh, (prompts.tokens, prompts.mask)
      )
      params = program.for_sampling(self.policy)
      out = self.call(
        "rollout",
        program.rollout_fn,
        params,
        tokens,
        mask,
        self.rollout_key(step),
      )
      del params  # a second copy, where sampling has its own layout
    return Sampled(step, prompts, out, start)

  def complete(self, sampled: Sampled, watch) -> None:
    """Waits for a rollout; the policy's parameters are still its own."""
    if sampled.seconds is not None:
      return
    settings, program = self.settings, self.program
    with watch("time/rollout_s"):
      out = jax.block_until_ready(sampled.completions)
      sampled.seconds = time.perf_counter() - sampled.begun_s
    entry = objectives.OBJECTIVES[settings.objective.name]
    if settings.rollout.stale_steps and entry.ratio:
      with watch("time/score_s"):
        batch = self.call("presentation", program.present_fn, out)
        sampled.old = [
          self.score(self.policy, batch, update, sampled.step)
          for update in range(settings.step.updates_per_rollout)
        ]
        jax.block_until_ready(sampled.old)

  def rollout_batch(self, batches, watch):
    """Samples, judges and assembles one batch.

    Returns:
      (batch, its scores or None where they are still to be computed, metrics).
    """
    program, settings = self.program, self.settings
    group = settings.rollout.group_size
    sampled = self.ahead or self.sample(batches, self.step, watch)
    prompts, out = sampled.prompts, sampled.completions
    self.complete(sampled, watch)
    with watch("time/rollout_s"):
      host_tokens = sharding.local_rows(out.tokens)
      ended = sharding.local_rows(out.completion_mask)
    self.stop_if_asked()
    early = following = None
    if settings.rollout.stale_steps:
      # The device has this to do while the host verifies. Scores wait for it,
      # so that no two programs take room at a time.
      if self.step + 1 < settings.run.steps:
        following = self.sample(batches, self.step + 1, watch)
    elif not settings.skip_equal_groups:
      # Nothing about these scores depends on the rewards: the device works on
      # them while the host verifies.
      batch = self.call("presentation", program.present_fn, out)
      early = (batch, self.scores(batch))
    with watch("time/reward_s"):
      judged = self.judge(prompts, host_tokens, ended)
    finished, forwards = self.finishes(prompts, out, watch)
    pending = [x for one in early[1] for x in one.arrays] if early else []
    if following is not None:
      pending = [following.completions.tokens]
    if not all(x.is_ready() for x in pending):
      watch.overlapped_s = watch.seconds["time/reward_s"]
    with watch("time/score_s"):
      # What the processes gather is behind it on the device.
      jax.block_until_ready(pending)
    self.stop_if_asked()
    if following is not None:
      self.complete(following, watch)
      self.following = following
    with watch("time/reward_s"):
      outcomes = self.outcomes(host_tokens, ended, judged)
      if finished is not None:
        finished = rollout.gather_finished(self.split, finished, group)
      host = self.assemble(out, host_tokens, ended, outcomes, finished)
    values = rollout.metrics(outcomes)
    values |= self.cut_prompts(prompts)
    values["rollout/denoiser_calls"] = int(out.denoiser_calls)
    values["compute/rollout"] = float(out.forwards) + forwards
    values["rollout/tokens_per_s"] = out.completion_mask.size / sampled.seconds
    if self.samples_due():
      records.keep_samples(self, prompts, judged, out, outcomes.rewards)
    if early is not None:
      put = functools.partial(sharding.put_global, program.mesh)
      batch = early[0].replace(
        advantage=put(host.advantage),
        target=put(host.target),
        lambda_=put(host.lambda_),
      )
      return batch, early[1], values
    batch = sharding.put_global(program.mesh, host)
    if sampled.old:
      old = [
        self.call("order", program.reorder_fn, one, batch)
        for one in sampled.old
      ]
      return batch, self.scores(batch, old), values
    return batch, None, values

  def judge(self, prompts, tokens, ended) -> rollout.Judged:
    """Verdicts of this process's own completions.

    Args:
      prompts: that it holds, a batch of data.py.
      tokens: i32 [n, S] that it holds.
      ended: bool [n, L], True through the first EOS.
    """
    split, program = self.split, self.program
    own = sharding.repeated(split.own, self.settings.rollout.group_size)
    texts = program.to_text(tokens[own, -ended.shape[1] :], ended[own])
    return program.judge([prompts.examples[i] for i in split.own], texts)

  def outcomes(self, tokens, ended, judged) -> rollout.Outcomes:
    """What all processes found of the completions of a rollout."""
    group = self.settings.rollout.group_size
    own = sharding.repeated(self.split.own, group)
    completions = tokens[own, -ended.shape[1] :]
    has_eos = (completions == self.program.model.config.eos_id).any(1)
    return rollout.gather(self.split, judged, ended[own], has_eos, group)

  def assemble(self, out, tokens, ended, outcomes, finished):
    """Host arrays of a step (`rollout.assemble`) from what all have found."""
    settings = self.settings
    advantages = rollout.advantages_of(
      outcomes.rewards,
      outcomes.correct,
      settings.objective,
      normalize=settings.normalize_advantages,
      skip_equal_groups=settings.skip_equal_groups,
      keep_groups=settings.rollout.keep_groups,
      finished=finished,
    )
    return rollout.assemble(
      tokens,
      sharding.local_rows(out.token_mask),
      ended,
      advantages,
      settings.objective,
      self.split,
      skip_equal_groups=settings.skip_equal_groups,
      scope=settings.likelihood.scope,
      commit_step=sharding.local_rows(out.commit_step)
      if settings.likelihood.needs_trace
      else None,
      lambda_=self.lambda_ if settings.objective.lambda_share else None,
    )

  def samples_due(self) -> bool:
    """Whether the step in progress leaves samples."""
    every = self.settings.run.samples_every
    return bool(every) and (self.step + 1) % every == 0

  def finishes(self, prompts, out, watch):
    """Rewards of completions of partial canvases, where an objective asks.

    One forward of the schedule is drawn for the whole step. Completing them
    counts as rollout, judging them as reward.

    Returns:
      (rewards f32 [F, n] of this host's own or None, forwards they took).
    """
    settings, program = self.settings, self.program
    objective = settings.objective
    if not objectives.OBJECTIVES[objective.name].finishes:
      return None, 0.0
    *keys, drawn = train_step.finish_keys(
      self.rollout_key(self.step), objective.finishes + 1
    )
    forward = jax.random.randint(drawn, (), 1, settings.sampler.steps)
    rewards, forwards = [], 0.0
    for key in keys:
      with watch("time/rollout_s"):
        done = self.call(
          "finishing", program.finish_fn, self.policy, out, forward, key
        )
        ended = sharding.local_rows(done.completion_mask)
        tokens = sharding.local_rows(done.tokens)
      with watch("time/reward_s"):
        rewards.append(self.judge(prompts, tokens, ended).rewards)
      forwards += float(done.forwards)
    return np.stack(rewards), forwards

  def rollout_key(self, step: int):
    """Key of a step's rollout."""
    return train_step.stream_key(
      self.settings.run.seed, step, train_step.ROLLOUT
    )

  def mask_key(self, update: int, step: int | None = None):
    """Key of the masks of one of a step's updates, shared by all scores.

    Of the present step where none is given.
    """
    step = self.step if step is None else step
    return train_step.mask_key(self.settings.run.seed, step, update)

  def score(self, params, batch, update: int, step: int | None = None):
    """Values of a batch under parameters, with the masks of an update."""
    key = self.mask_key(update, step)
    return self.call("scores", self.program.estimate_fn, params, batch, key)

  @property
  def reference(self):
    """Parameters of the reference as it stands."""
    own = self.state.reference
    return self.program.params if own is None else self.program.policy(own)

  def pair(self, batch, update: int):
    """(policy's values, reference's) of a batch from one pass."""
    params = self.policy
    if self.state.reference is not None:
      params = params.replace(reference=self.state.reference)
    return self.call(
      "scores", self.program.pair_fn, params, batch, self.mask_key(update)
    )

  def scored_inside(self, batch) -> bool:
    """Whether the update scores the reference itself."""
    return self.program.pair_fn is not None and not self.two_passes(batch)

  def scores(self, batch, old=()) -> list["Scores"]:
    """Values of a batch before its first update, for each of its updates.

    Args:
      batch: of the step.
      old: those under the parameters that sampled it, where they are older.
    """
    settings = self.settings
    entry = objectives.OBJECTIVES[settings.objective.name]
    uses = entry.uses_reference(settings.objective)
    updates = settings.step.updates_per_rollout
    # The parameters that sampled are still the policy's.
    own = entry.ratio and updates > 1 and not old
    out = []
    for update in range(updates):
      reference = policy = None
      needed = own or (self.two_passes(batch) and not update)
      inside = self.scored_inside(batch)
      if self.program.pair_fn is not None and needed and not inside:
        policy, reference = self.pair(batch, update)
      else:
        if uses and not inside:
          reference = self.score(self.reference, batch, update)
        if needed:
          policy = self.score(self.policy, batch, update)
      sampler = old[update] if old else policy if own else None
      out.append(Scores(reference, policy, sampler))
    return out

  def two_passes(self, batch) -> bool:
    """Whether an update needs the policy's values beforehand."""
    settings, total = self.settings, batch.tokens.shape[0]
    passes = train_step.resolve_passes(settings.step, settings.objective, total)
    return passes == "two"

  def check_start(self, batch, reference) -> None:
    """Before the first update policy and reference are one: d must be 0."""
    if self.step:
      return
    if self.scored_inside(batch):
      policy, reference = self.pair(batch, 0)
    elif reference is None:
      return
    else:
      policy = self.score(self.policy, batch, 0)
    worst = float(jnp.abs(policy - reference).max())
    if worst != 0.0:
      self.writer.warn(
        f"Relative scores before the first update are off by {worst:.2e} nats "
        "per token where they should be exactly 0: policy and reference are "
        "not scored alike."
      )

  def check_first_update(self, values) -> None:
    """The same inside the gradient's program: 1e-6 nats per token in float32.

    With bfloat16 what is measured is the noise floor of d, which is said.
    """
    if self.step or "score/relative_std" not in values:
      return
    if not self.settings.objective.subtract_reference:
      return  # what is called relative then is the policy's own
    worst = max(
      abs(values["score/relative_mean"]), values["score/relative_std"]
    )
    if self.program.model.config.compute_dtype != "float32":
      self.writer.say(
        f"Noise floor of d in {self.program.model.config.compute_dtype}: "
        f"{worst:.1e} nats per token, measured where policy and reference are "
        "one."
      )
    elif worst > START_TOLERANCE:
      self.writer.warn(
        f"Relative scores inside the first update are off by {worst:.2e} nats "
        f"per token, more than {START_TOLERANCE:.0e}: the gradient's program "
        "does not score as the reference's does."
      )

  def update(self, batch, scores, index: int) -> dict[str, float]:
    """One of a step's updates; returns its metrics."""
    if index and self.two_passes(batch):
      policy = self.score(self.policy, batch, index)
      scores = dataclasses.replace(scores, policy=policy)
    self.state, values = self.call(
      "update",
      self.program.update_fn,
      self.state,
      batch,
      self.mask_key(index),
      scores.reference,
      scores.policy if self.two_passes(batch) else None,
      scores.old,
      self.program.frozen,
    )
    self.amid_updates = True
    return {k: float(v) for k, v in jax.device_get(values).items()}

  def train_one(self, batches) -> dict[str, float]:
    """One step; returns its metrics as floats.

    Raises:
      Interrupted: a signal came; the state is that before the step.
    """
    start, compiled_s = time.perf_counter(), self.compiling_s
    watch = Stopwatch()
    scores = None
    if self.settings.supervised:
      batch, values = self.demonstration_batch(batches, watch)
    else:
      batch, scores, values = self.rollout_batch(batches, watch)
    with watch("time/score_s"):
      if scores is None:
        scores = self.scores(batch)
      self.check_start(batch, scores[0].reference)
      jax.block_until_ready([s.arrays for s in scores])
    if self.samples_due():
      with watch("time/samples_s"):
        records.keep_calibration(self, batch, scores[0])
    with watch("time/update_s"):
      updates = [self.update(batch, one, i) for i, one in enumerate(scores)]
    self.check_first_update(updates[0])
    self.step += 1
    self.ahead, self.following = self.following, None
    values = mean_of_updates(updates) | values
    before = self.computed
    self.count_compute(batch, values)
    bad = incident.not_finite(values)
    values |= self.tally.count(bad, values, self.computed - before)
    if bad:
      records.write_incident(self, bad, values, batch, scores)
    else:
      self.follow_lambda(values)
      every = self.settings.reference_every
      if every and self.step % every == 0:
        self.state = self.call(
          "refreshing", self.program.refresh_fn, self.state
        )
      for warning in self.watch.see(
        values,
        self.settings.run.collapse_window,
        self.settings.rollout.group_size,
      ):
        self.writer.warn(f"Step {self.step}: {warning}")
    self.amid_updates = False
    values |= watch.seconds
    values["time/step_s"] = time.perf_counter() - start
    spent = {k: v for k, v in values.items() if k.startswith("time/")}
    values["time/host_share"] = watch.host_share(values["time/step_s"])
    spent["first_calls"] = self.compiling_s - compiled_s
    for key, value in spent.items():
      self.count_seconds(key, value)
    return values

  def count_compute(self, batch, values) -> None:
    """Adds what a step has cost, in forwards of one whole sequence.

    A backward pass counts two. `compute/forward_equivalents` is per completion
    of the rollout; `compute/cumulative` sums over completions and steps.
    """
    settings = self.settings
    entry = objectives.OBJECTIVES[settings.objective.name]
    updates, masks = (
      settings.step.updates_per_rollout,
      settings.likelihood.masks,
    )
    scored = updates * entry.uses_reference(settings.objective)
    # Of older parameters: scored before the rewards were known, all of them.
    older = entry.ratio * settings.rollout.stale_steps * updates
    two = self.two_passes(batch)
    old = entry.ratio and updates > 1 and not older
    if old or two:
      scored += updates
    if old and two:
      scored += updates - 1  # the first update's are the rollout's own
    kept = values["update/kept_share"]
    rollout_forwards = values.get("compute/rollout", 0.0)
    # Scores that were dispatched before the rewards were known cover all.
    early = not (
      settings.supervised
      or settings.skip_equal_groups
      or self.scored_inside(batch)
    )
    scored = scored * (1.0 if early else kept) + older
    values["compute/score"] = scored * masks
    values["compute/update"] = 3.0 * updates * masks * kept
    values["compute/forward_equivalents"] = (
      rollout_forwards + values["compute/score"] + values["compute/update"]
    )
    total = batch.tokens.shape[0] * values["compute/forward_equivalents"]
    self.computed += total
    values["compute/cumulative"] = self.computed

  def follow_lambda(self, values) -> None:
    """Lets lambda follow its target share, where there is one."""
    objective = self.settings.objective
    if objective.lambda_share and values["update/applied"]:
      self.lambda_ = objectives.follow_share(
        self.lambda_, values["gap/lambda_share"], objective
      )

  def mirror(self) -> None:
    """Brings a run's folder in a bucket up to date.

    Raises:
      MirrorError: the bucket did not take it; raised by every process, since
        one that went on alone would hang in the next collective.
    """
    if not self.home.in_bucket:
      return
    failure = None
    if self.main_process:
      self.writer.flush()
      try:
        self.home.push()
      except mirror.MirrorError as error:
        failure = error
    if sharding.gather_rows(np.array([failure is not None])).any():
      raise failure or mirror.MirrorError(
        "The first process could not copy the run to its bucket; its message "
        "names the cause."
      )

  def count_seconds(self, key: str, value: float) -> None:
    """Adds to what the run has spent on something."""
    self.seconds[key] = self.seconds.get(key, 0.0) + value

  def check_state(self) -> None:
    """Refuses to save numbers that are not finite.

    Raises:
      incident.IncidentError: an update overflowed; checkpoints are left alone.
    """
    if not program_lib.is_finite(self.state):
      raise incident.IncidentError(
        f"After step {self.step} parameters or moments are not finite: nothing "
        "is saved over the earlier checkpoints. Lower optimizer.learning_rate "
        "or optimizer.clip_norm."
      )

  def export(self) -> None:
    """Writes model/ in the Hugging Face layout, and adapter/ in PEFT's."""
    program, trained = self.program, self.state.params
    if program.lora is not None:
      hf_adapters.save_adapter(
        self.home.address / "adapter",
        program.model.config,
        program.lora,
        trained,
        base=self.settings.model["path"],
      )
    model = program_lib.merged(program, trained)
    hf_weights.save_model(model, self.home.address / "model")
