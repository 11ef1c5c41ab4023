"""The one loop: build, jit with shardings, run, log, save, resume.

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
import os
import pathlib
import sys
import tempfile
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rspo_jax import (
  collapse,
  data,
  environment,
  evaluate,
  incident,
  metrics,
  mirror,
  objectives,
  processes,
  profiler,
  rollout,
  room,
  scores,
  sharding,
  traces,
  trackers,
  train_step,
  workers,
)
from rspo_jax import program as program_lib
from rspo_jax import settings as settings_lib
from rspo_jax.checkpoint import (
  Checkpointer,
  CheckpointError,
  CheckpointMismatch,
)
from rspo_jax.interrupt import Interrupt
from rspo_jax.models import hf_adapters, hf_weights

DONE, MISTAKE, FAULT, INTERRUPTED = 0, 2, 3, 75
SUMMARY = "summary.json"
ENVIRONMENT = "environment.json"
# Below it the gap is the advantage: rspo.md's bound for saying so.
NEGLIGIBLE_SHARE = 0.01
SHARED_FOLDER_S = 60.0  # until a network disk must show what was written
SAMPLED_GROUPS = 8  # groups of a rollout that samples/ shows
TEXT_ROWS = 16  # completions of it that TensorBoard shows
FAULTS = (
  metrics.NonFiniteMetric,
  metrics.MetricsError,
  mirror.MirrorError,
  CheckpointError,
  incident.IncidentError,
  workers.WorkersError,
)


class Interrupted(Exception):
  """A signal came amid an evaluation or a step, which is given up."""


def _prompts(
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
    self.eval_prompts = _prompts(
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
    everyone = sharding.gather_json([int(batch.cut.sum())])
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
    """Samples, judges and assembles one batch; returns it with metrics."""
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
      length = ended.shape[1]
      texts = program.to_text(host_tokens[:, -length:], ended)
      judged = program.judge(prompts.examples, texts)
    finished, forwards = self.finishes(prompts, out, watch)
    with watch("time/reward_s"):
      host = rollout.assemble(
        host_tokens,
        sharding.local_rows(out.token_mask),
        ended,
        judged,
        settings.objective,
        normalize=settings.normalize_advantages,
        skip_equal_groups=settings.skip_equal_groups,
        scope=settings.likelihood.scope,
        shards=settings.step.shards // jax.process_count(),
        first_row=jax.process_index() * len(texts),
        commit_step=sharding.local_rows(out.commit_step)
        if settings.likelihood.needs_trace
        else None,
        lambda_=self.lambda_ if settings.objective.lambda_share else None,
        finished=finished,
        keep_groups=settings.rollout.keep_groups // jax.process_count(),
      )
    pending = [x for one in early[1] for x in one.arrays] if early else []
    if following is not None:
      pending = [following.completions.tokens]
    if not all(x.is_ready() for x in pending):
      watch.overlapped_s = watch.seconds["time/reward_s"]
    self.stop_if_asked()
    if following is not None:
      self.complete(following, watch)
      self.following = following
    values = rollout_metrics(
      judged,
      ended,
      (host_tokens[:, -length:] == program.model.config.eos_id).any(1),
      group,
    )
    values |= self.cut_prompts(prompts)
    values["rollout/denoiser_calls"] = int(out.denoiser_calls)
    values["compute/rollout"] = float(out.forwards) + forwards
    values["rollout/tokens_per_s"] = (
      ended.size * jax.process_count() / sampled.seconds
    )
    if self.samples_due():
      self.keep_samples(prompts, judged, out)
    if early is not None:
      put = functools.partial(sharding.put_global, program.mesh)
      batch = early[0].replace(
        advantage=put(host.advantage),
        target=put(host.target),
        lambda_=put(host.lambda_),
      )
      return (batch, early[1]), values
    batch = sharding.put_global(program.mesh, host)
    if sampled.old:
      old = [
        self.call("order", program.reorder_fn, one, batch)
        for one in sampled.old
      ]
      return (batch, self.scores(batch, old)), values
    return batch, values

  def samples_due(self) -> bool:
    """Whether the step in progress leaves samples."""
    every = self.settings.run.samples_every
    return bool(every) and (self.step + 1) % every == 0

  def keep_samples(self, prompts, judged, out) -> None:
    """The first groups of a rollout into samples/ and TensorBoard."""
    group = self.settings.rollout.group_size
    count = min(SAMPLED_GROUPS * group, len(judged.texts))
    scored = sharding.local_rows(out.completion_mask)[:count]
    length = scored.shape[1]
    played = traces.denoising_rows(
      self.program.pieces,
      sharding.local_rows(out.tokens)[:count, -length:],
      scored,
      sharding.local_rows(out.commit_step)[:count],
    )
    rows = [
      {
        "prompt": self.program.prompt(prompts.examples[i // group]),
        "completion": judged.texts[i],
        **rollout.verdict_row(judged.verdicts[i]),
        **played[i],
      }
      for i in range(count)
    ]
    rows = sharding.gather_json(rows)[: SAMPLED_GROUPS * group]
    rewards = sharding.gather_rows(judged.rewards)
    step = self.step + 1
    self.write_rows(self.workdir / "samples" / f"train-{step:06d}.jsonl", rows)
    self.writer.text(
      step, "samples/completions", traces.readable(rows[:TEXT_ROWS])
    )
    self.writer.histogram(step, "reward", rewards)

  def keep_calibration(self, batch, scores) -> None:
    """Targets beside estimates into samples/, their spread to TensorBoard.

    In the one-pass form the policy is scored here once more: a forward in
    `run.samples_every` steps.
    """
    objective = self.settings.objective
    has_gap = objective.name == "rspo"
    reference, policy = scores.reference, scores.policy
    entry = objectives.OBJECTIVES[objective.name]
    inside = self.scored_inside(batch)
    if (reference is None and not inside) or entry.per_token:
      return
    if inside:
      policy, reference = self.pair(batch, 0)
    elif policy is None:
      policy = self.score(self.policy, batch, 0)
    columns = traces.calibration(
      *(
        sharding.gather_rows(sharding.local_rows(x))
        for x in (
          policy,
          reference,
          batch.advantage,
          batch.completion_mask.sum(-1),
          batch.keep,
          batch.row,
        )
      ),
      dataclasses.replace(objective, lambda_=self.lambda_),
    )
    step = self.step + 1
    if has_gap and "target" in columns:
      self.write_rows(
        self.workdir / "samples" / f"calibration-{step:06d}.jsonl",
        traces.calibration_rows(columns),
      )
    for name, key in (
      ("score/relative", "relative"),
      ("score/centred", "estimate"),
      ("gap", "gap"),
    ):
      if has_gap or key == "relative":
        self.writer.histogram(step, name, columns[key])

  def finishes(self, prompts, out, watch):
    """Rewards of completions of partial canvases, where an objective asks.

    One forward of the schedule is drawn for the whole step. Completing them
    counts as rollout, judging them as reward.

    Returns:
      (rewards f32 [F, n] of this host or None, forwards they took).
    """
    settings, program = self.settings, self.program
    objective = settings.objective
    if not objectives.OBJECTIVES[objective.name].finishes:
      return None, 0.0
    key = jax.random.fold_in(self.rollout_key(self.step), 1)
    keys = jax.random.split(key, objective.finishes + 1)
    forward = jax.random.randint(keys[-1], (), 1, settings.sampler.steps)
    rewards, forwards = [], 0.0
    for own in keys[:-1]:
      with watch("time/rollout_s"):
        done = self.call(
          "finishing", program.finish_fn, self.policy, out, forward, own
        )
        ended = sharding.local_rows(done.completion_mask)
        tokens = sharding.local_rows(done.tokens)[:, -ended.shape[1] :]
      with watch("time/reward_s"):
        texts = program.to_text(tokens, ended)
        rewards.append(program.judge(prompts.examples, texts).rewards)
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
    key = train_step.stream_key(self.settings.run.seed, step, train_step.MASKS)
    return jax.random.fold_in(key, update) if update else key

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
    if self.settings.supervised:
      batch, values = self.demonstration_batch(batches, watch)
    else:
      batch, values = self.rollout_batch(batches, watch)
    with watch("time/score_s"):
      if isinstance(batch, tuple):
        batch, scores = batch
      else:
        scores = self.scores(batch)
      self.check_start(batch, scores[0].reference)
      jax.block_until_ready([s.arrays for s in scores])
    if self.samples_due():
      with watch("time/samples_s"):
        self.keep_calibration(batch, scores[0])
    with watch("time/update_s"):
      updates = [self.update(batch, one, i) for i, one in enumerate(scores)]
    self.step += 1
    self.ahead, self.following = self.following, None
    values = mean_of_updates(updates) | values
    before = self.computed
    self.count_compute(batch, values)
    bad = incident.not_finite(values)
    values |= self.tally.count(bad, values, self.computed - before)
    if bad:
      self.write_incident(bad, values, batch, scores)
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

  def write_incident(self, bad, values, batch, scores) -> None:
    """Keeps what a step that is not finite was made of."""
    folder = incident.folder_of(self.workdir, self.step)
    seed, before = self.settings.run.seed, self.step - 1
    arrays = {"batch": batch, "scores": [vars(each) for each in scores]}
    tokens = sharding.local_rows(batch.tokens)
    seen = sharding.local_rows(batch.token_mask)
    message = incident.write(
      folder,
      {
        "step": self.step,
        "not_finite": incident.encode(bad),
        "metrics": incident.encode(values),
        "in_a_row": self.tally.in_a_row,
        "processes": jax.process_count(),
        "seed": seed,
        "keys": {
          name: jax.random.key_data(
            train_step.stream_key(seed, before, stream)
          ).tolist()
          for name, stream in (
            ("rollout", train_step.ROLLOUT),
            ("masks", train_step.MASKS),
          )
        },
        "texts": self.program.to_text(tokens, seen),
      },
      arrays,
    )
    names = sorted(bad, key=lambda key: ("/" in key, key))
    listed = ", ".join(f"{name} = {bad[name]}" for name in names)
    applied = values.get("update/applied", 0.0)
    self.writer.warn(
      f"Step {self.step} is not finite: {listed}. It was "
      f"{'applied all the same' if applied else 'not applied'}; "
      + (message or f"its inputs and keys are in {folder}.")
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


def rollout_metrics(
  judged: rollout.Judged, ended: np.ndarray, has_eos: np.ndarray, group: int
) -> dict[str, float]:
  """Metrics of a rollout, over the completions of all processes.

  Args:
    judged: verdicts of this process's n completions, groups contiguous.
    ended: bool [n, L], True through the first EOS.
    has_eos: bool [n], whether a completion has one.
    group: completions of a prompt, G.
  """
  distinct = [
    len(set(judged.texts[i : i + group])) / group
    for i in range(0, len(judged.texts), group)
  ]
  table = np.stack(
    [
      judged.rewards,
      judged.correct,
      ended.sum(1),
      has_eos,
      np.repeat(distinct, group),
      judged.unjudged,
      [not text.strip() for text in judged.texts],
    ],
    axis=1,
  ).astype(np.float32)
  rewards, correct, length, eos, distinct, unjudged, empty = (
    sharding.gather_rows(table).astype(np.float64).T
  )
  return {
    "reward/mean": float(rewards.mean()),
    "reward/std": float(rewards.std()),
    "reward/equal_groups": float(
      objectives.equal_groups(rewards.reshape(-1, group)).mean()
    ),
    "reward/correct": float(correct.mean()),
    "reward/no_verdict": float(unjudged.mean()),
    "rollout/length_mean": float(length.mean()),
    "rollout/eos_share": float(eos.mean()),
    "rollout/empty_share": float(empty.mean()),
    "rollout/distinct_share": float(distinct.mean()),
  }


def _cache(setting: str) -> None:
  """Switches JAX's persistent compilation cache on."""
  if not setting:
    return
  folder = setting
  if setting == "auto":
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(root, "rspo_jax", "xla")
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes a JSON file that is there whole or not at all."""
  descriptor, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
  try:
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
      json.dump(value, file, indent=2, sort_keys=True)
      file.write("\n")
    os.chmod(name, 0o644)
    os.replace(name, path)
  except BaseException:
    os.unlink(name)
    raise


def main(config, workdir: str, mode: str) -> int:
  """Runs a command; returns the exit status.

  Args:
    config: the resolved ConfigDict.
    workdir: folder of the run.
    mode: "train" or "eval".
  """
  resolved = config.to_dict()
  try:
    processes.initialise()
    settings = settings_lib.build(config, jax.device_count())
    settings_lib.check_workdir(workdir, resolved, mode)
    home = mirror.Home(workdir)
    if mode == "train" and _is_finished(home.address, settings.run.steps):
      print(f"This run is finished: {home.address / SUMMARY}")
      return DONE
    _cache(settings.run.compilation_cache)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return MISTAKE
  evaluating = mode == "eval"
  writer = metrics.MetricsWriter(
    home.local,
    settings.run.steps,
    settings.run.tensorboard and not evaluating,
    settings.run.log == "quiet",
    debug=settings.run.log == "debug",
    active=jax.process_index() == 0,
    # In eval mode standard output is for the one line of the result.
    stream=sys.stderr if evaluating else sys.stdout,
  )

  def notify(name: str, at_once: bool) -> None:
    then = "saving what is there, then stopping"
    if evaluating or at_once:
      then = "stopping"
    if at_once and not evaluating:
      then += "; nothing is lost, the same command goes on from here"
    writer.warn(f"{name}: {then}.")

  with writer, Interrupt(notify, settings.run.grace_s) as interrupt:
    status = _guarded(settings, home, writer, interrupt, resolved, mode)
  if jax.process_index() == 0:
    # What came after the last save, or says why the run ended.
    try:
      home.push("eval" if evaluating else "")
    except mirror.MirrorError as error:
      writer.fail(error)
      return FAULT
  return status


def _is_finished(folder, steps: int) -> bool:
  """Whether a run has done all its steps.

  Raises:
    ValueError: its summary cannot be read.
  """
  path = folder / SUMMARY
  if not path.exists():
    return False
  try:
    return json.loads(path.read_text(encoding="utf-8"))["steps"] >= steps
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} cannot be read ({error}); delete it to have it written again."
    ) from error


def _guarded(settings, home, writer, interrupt, resolved, mode) -> int:
  """Prepares and runs; what goes wrong becomes an exit status."""
  try:
    with writer.phase("preparing model and data"):
      if mode == "train":
        room.check_memory(settings)
      run = Run(program_lib.build(settings), home, writer, interrupt, resolved)
      if mode == "eval":
        source = _load_evaluated(run)
      else:
        room.check_disk(run.program, home.address)
        batches = _batches(run)
        _open_workdir(run)
  except mirror.MirrorError as error:
    writer.fail(error)
    return FAULT
  except (ValueError, OSError) as error:
    # Folders and files of the caller: nothing of the run was written.
    if settings.run.log == "debug":
      traceback.print_exc()
    writer.fail(" ".join(str(error).split()))
    return MISTAKE
  try:
    if mode == "eval":
      return evaluate_only(run, source)
    return train(run, batches)
  except (data.DataError, CheckpointMismatch) as error:
    writer.fail(error)
    return MISTAKE
  except FAULTS as error:
    writer.fail(error)
    return FAULT
  except OSError as error:
    writer.fail(
      f"{error}. Make room or make the folder writable and run the same "
      "command to go on from the last checkpoint."
    )
    return FAULT
  except jax.errors.JaxRuntimeError as error:
    cause = str(error).splitlines()[0]
    if "RESOURCE_EXHAUSTED" in str(error):
      writer.fail(
        f"The device is out of memory ({cause}). Lower train.micro_batch, "
        "rollout.prompts or eval.batch."
      )
      return FAULT
    if jax.process_count() == 1:
      raise
    writer.fail(
      f"Another process of the run has gone, it seems ({cause}). Run the same "
      "command in all of them to go on from the last checkpoint."
    )
    # Leaving in order would mean to wait for the one that is gone.
    os._exit(FAULT)


def _open_workdir(run: Run) -> None:
  """Makes the folder of a run; one that is new gets its config."""
  if run.main_process:
    brought = run.home.pull()
    run.workdir.mkdir(parents=True, exist_ok=True)
    if settings_lib.read_config(run.workdir) is None:
      write_json(run.workdir / settings_lib.CONFIG, run.config)
    if run.home.in_bucket:
      run.writer.say(
        f"Local copies in {run.workdir}; {brought} files came from the bucket."
      )
  if run.home.in_bucket:
    run.mirror()
  else:
    _check_shared(run)


def _check_shared(run: Run) -> None:
  """Refuses a folder that some of the processes do not see.

  Raises:
    ValueError: in every process.
  """
  if jax.process_count() == 1:
    return
  # The first process has written by the time that all are here.
  sharding.gather_rows(np.zeros(1))
  path = run.workdir / settings_lib.CONFIG
  end = time.monotonic() + SHARED_FOLDER_S
  while not (seen := path.exists()) and time.monotonic() < end:
    time.sleep(0.2)  # network disks show what others wrote after a while
  blind = np.flatnonzero(~sharding.gather_rows(np.array([seen])))
  if blind.size:
    if run.main_process and len(list(run.workdir.iterdir())) == 1:
      path.unlink()
      run.workdir.rmdir()
    raise ValueError(
      f"--workdir={run.workdir} is not seen by process "
      f"{', '.join(map(str, blind))}: hosts without a shared disk need a "
      "folder in a bucket, --workdir=gs://BUCKET/FOLDER."
    )


def _open_trackers(run: Run) -> None:
  """Brings in what run.logger names."""
  wanted = trackers.names(run.settings.run.logger)
  if not wanted:
    return
  config = {
    key: value
    for key, value in settings_lib.flat(run.config).items()
    if key not in settings_lib.FREE_KEYS
  }
  run.writer.attach(
    trackers.Trackers(wanted, run.workdir, config, run.writer.warn)
  )


def _take_config(run: Run) -> None:
  """Puts config and environment of this part of a run in its folder.

  One that the run had before, and that meant something else, is kept under
  the name of the step up to which it was in force.
  """
  if not run.main_process:
    return
  before = settings_lib.read_config(run.workdir)
  changed = settings_lib.changed_keys(before, run.config)
  if changed:
    run.writer.warn(
      f"From step {run.step} on the run has another config: "
      f"{', '.join(changed)}."
    )
    write_json(run.workdir / f"config-until-{run.step:06d}.json", before)
  if before != run.config:
    write_json(run.workdir / settings_lib.CONFIG, run.config)
  write_json(run.workdir / ENVIRONMENT, environment.describe())
  _open_trackers(run)


def _batches(run: Run):
  """Training batches, indexable by step: a function of (seed, step).

  Raises:
    DataError: the data, or its first batch, cannot be used.
  """
  settings, program = run.settings, run.program
  examples = data.load_examples(program.task, "train", settings.data)
  common = dict(
    prompt=program.prompt,
    encode=program.model.tokenizer.encode,
    prompt_length=settings.prompt_length,
    pad_id=program.model.config.pad_id,
    long_prompts=settings.long_prompts,
    batch_size=settings.rollout.prompts,
    seed=settings.run.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  if settings.supervised:
    batches = data.demonstration_batches(
      examples,
      task=program.task,
      completion_length=settings.sampler.completion_length,
      eos_id=program.model.config.eos_id,
      corrupt_share=settings.corrupt_share,
      **common,
    )
  else:
    batches = data.prompt_batches(examples, **common)
  batches[0]
  return data.Ahead(batches, settings.run.steps)


def train(run: Run, batches) -> int:
  """Trains to the last step, from the newest good checkpoint if any.

  A step's row of metrics is written when its evaluation, where one is due, is
  done; until then its values wait in `pending`, in a checkpoint too, so that
  a run that is interrupted in between gets the same row.
  """
  settings, writer = run.settings, run.writer
  steps, every = settings.run.steps, settings.eval.every
  checkpointer = Checkpointer(
    run.home.address / "checkpoints",
    keep_last=settings.run.keep_checkpoints,
    keep_every=settings.run.keep_every or None,
    keep_best=settings.run.keep_best,
  )
  with checkpointer, contextlib.closing(batches):
    pending = _restore(run, checkpointer, batches)
    _take_config(run)
    writer.debug(described(run))

    def save(score=None):
      if run.saved_step == run.step:
        return
      start = time.perf_counter()
      run.check_state()
      # First: a checkpoint must not know rows that the bucket does not have.
      run.mirror()
      checkpointer.save(run.step, run.saved, _extra(run, pending), score)
      run.saved_step = run.step
      run.count_seconds("time/save_s", time.perf_counter() - start)

    profile = profiler.Profiler(
      run.workdir / "profile",
      settings.run.profile if run.main_process else 0,
      writer.table,
      writer.warn,
    )
    while True:
      last = run.step == steps
      if pending is not None:
        score = None
        if run.step in (0, steps) or (every and run.step % every == 0):
          if run.interrupt.agreed(run.step):
            break
          try:
            stem = run.workdir / "samples" / f"eval-{run.step:06d}"
            pending |= run.evaluate(stem)
          except Interrupted:
            break
          score = pending["eval/accuracy"]
        try:
          writer.write(run.step, pending)
        except metrics.NonFiniteMetric:
          # Said, and kept in incident/, when the step was made.
          if not run.tally.in_a_row:
            raise
        pending = None
        limit = settings.run.non_finite_limit
        if limit and run.tally.in_a_row >= limit:
          _give_up(run, checkpointer)
        scored = settings.run.keep_best and score is not None
        if (
          last
          or scored
          or (run.step and run.step % settings.run.checkpoint_every == 0)
        ):
          save(score)
      if last or run.interrupt.agreed(run.step):
        break
      try:
        with profile.step():
          pending = run.train_one(batches)
      except Interrupted:
        break
      writer.debug(timed(run.step, pending))
    profile.close()
    if not last or pending is not None:
      save()
      checkpointer.wait()
      writer.say("Saved; the same command goes on from here.")
      return INTERRUPTED
  finish(run)
  return DONE


def described(run: Run) -> str:
  """What the debug level says before the first step."""
  settings = run.settings
  total = settings.rollout.prompts * settings.rollout.group_size
  size = sum(x.size for x in jax.tree.leaves(run.state.params))
  mesh = " x ".join(f"{k} {n}" for k, n in run.program.mesh.shape.items())
  return (
    f"{size:,} trained parameters on {jax.device_count()} "
    f"{jax.devices()[0].device_kind} ({mesh}); {total} sequences a step in "
    f"micro-batches of {settings.step.micro_batch}; prompts of "
    f"{settings.prompt_length}, completions of "
    f"{settings.sampler.completion_length} tokens"
  )


def timed(step: int, values: dict[str, float]) -> str:
  """What the debug level says of a step: where its time went."""
  phases = {
    key[5:-2]: value
    for key, value in values.items()
    if key.startswith("time/") and key.endswith("_s")
  }
  total = phases.pop("step", 0.0)
  split = ", ".join(f"{name} {s:.3f}" for name, s in phases.items())
  return f"step {step}: {total:.3f} s ({split})"


def _give_up(run: Run, checkpointer: Checkpointer) -> None:
  """Ends a run whose last steps were not finite, at its last good state.

  Steps that are not applied leave parameters and moments alone, so the last
  good state is still at hand, under a later number.

  Raises:
    incident.IncidentError: always.
  """
  count = run.tally.in_a_row
  step = run.step - count
  kept = "the checkpoints before them are kept"
  if not run.tally.applied:
    run.check_state()
    # One update a step, or several.
    updates = int(run.state.step)
    behind = updates - updates * step // run.step
    run.step = step
    run.computed -= run.tally.wasted
    run.tally.not_finite -= count
    run.tally.in_a_row = run.tally.wasted = 0
    if run.saved_step != step:
      # What was sampled since is of later steps.
      run.ahead = None
      state = run.state.replace(step=run.state.step - behind)
      checkpointer.save(step, state, _extra(run, None))
    checkpointer.wait()
    kept = f"the last good state, of step {step}, is saved"
  raise incident.IncidentError(
    f"{count} steps in a row up to step {step + count} were not finite; "
    f"{kept}. What they were made of is in {run.workdir / incident.FOLDER}. "
    "Look there for the culprit; run.non_finite_limit=0 goes on regardless."
  )


def _extra(run: Run, pending: dict | None) -> dict[str, Any]:
  """What a checkpoint keeps beside the state."""
  return {
    "first_eval": run.first_eval,
    "last_eval": run.last_eval,
    "by_difficulty": run.by_difficulty,
    "seconds": run.seconds,
    "computed": run.computed,
    "lambda": run.lambda_,
    "ahead": None if run.ahead is None else {"seconds": run.ahead.seconds},
    "pending": incident.encode(pending),
    "tally": dataclasses.asdict(run.tally),
    "watch": dataclasses.asdict(run.watch),
  }


def _template(program: program_lib.Program, extra: dict[str, Any]):
  """The tree of a checkpoint that has this beside it."""
  # Absent in checkpoints of earlier versions.
  ahead = program.ahead_template() if extra.get("ahead") else None
  return program.state_template.replace(ahead=ahead)


def _restore(run: Run, checkpointer: Checkpointer, batches):
  """Sets the run to its newest good checkpoint, or to the start.

  Returns:
    Values of the row that is still to be written, or None.

  Raises:
    CheckpointMismatch: the run is past the last step that is asked for.
  """
  writer = run.writer
  restored = checkpointer.restore(functools.partial(_template, run.program))
  steps = run.settings.run.steps
  if restored is None:
    run.state = program_lib.fresh_state(run.program)
    pending, messages = {}, writer.truncate_to(-1)
  else:
    if restored.step > steps:
      raise CheckpointMismatch(
        f"run.steps={steps}, but the run has reached step {restored.step}; "
        "use at least that, or another --workdir."
      )
    extra = restored.extra
    run.state, run.step = restored.state.replace(ahead=None), restored.step
    run.saved_step = restored.step
    ahead = restored.state.ahead
    if ahead is not None and run.settings.rollout.stale_steps:
      seconds = extra["ahead"]["seconds"]
      run.ahead = Sampled(run.step, batches[run.step], **ahead, seconds=seconds)
    run.first_eval, run.last_eval = extra["first_eval"], extra["last_eval"]
    run.seconds = extra["seconds"]
    # Absent in checkpoints of earlier versions.
    run.by_difficulty = extra.get("by_difficulty", [])
    run.computed = extra.get("computed", 0.0)
    run.lambda_ = extra.get("lambda", run.lambda_)
    run.tally = incident.Tally(**extra.get("tally", {}))
    run.watch = collapse.Watch(**extra.get("watch", {}))
    pending = incident.decode(extra["pending"])
    rows = run.step - (pending is not None)
    messages = restored.messages + writer.truncate_to(rows)
    writer.say(f"Going on from step {run.step} of {steps}.")
  for message in messages:
    writer.warn(message)
  return pending


def finish(run: Run) -> None:
  """Exports the model and says what came of the run."""
  settings, writer = run.settings, run.writer
  exported = "model/" if run.program.lora is None else "model/, adapter/"
  if settings.run.export:
    with writer.phase(f"exporting {exported}"):
      run.export()
  seconds = {k: round(v, 2) for k, v in run.seconds.items()}
  summary = {
    "before": run.first_eval,
    "after": run.last_eval,
    "by_difficulty": run.by_difficulty,
    "seconds": seconds,
    "steps": run.step,
  }
  share = lambda_share(run)
  if share is not None:
    summary["lambda_share"] = share
  if run.main_process:
    write_json(run.workdir / SUMMARY, summary)
  rows = []
  for name, key in (
    ("greedy accuracy", "eval/accuracy"),
    (
      f"accuracy at T={settings.sampled.temperature:g}",
      "eval/accuracy_sampled",
    ),
    ("mean reward (greedy)", "eval/reward"),
  ):
    before, after = run.first_eval[key], run.last_eval[key]
    rows.append(
      {
        "": name,
        "before": f"{before:.3f}",
        "after": f"{after:.3f}",
        "change": f"{after - before:+.3f}",
      }
    )
  writer.table(
    rows,
    title=f"{settings.eval.split}, n = {run.last_eval['eval/n']}, "
    f"{run.step} steps",
  )
  total = max(seconds.get("time/step_s", 0.0), 1e-9)
  phases = {
    key[5:-2]: value
    for key, value in seconds.items()
    if key.startswith("time/") and key != "time/step_s"
  }
  phases["other"] = max(0.0, total - sum(phases.values()))
  split = ", ".join(
    f"{name} {100 * value / total:.0f} %" for name, value in phases.items()
  )
  first_s = seconds.get("first_calls", 0.0)
  writer.say(
    f"Steps took {total:.0f} s, {first_s:.0f} s of them in first calls, which "
    f"compile: {split}."
  )
  if share is not None and share < NEGLIGIBLE_SHARE:
    writer.say(
      f"gap/lambda_share was {share:.1e} on average: the gap was the advantage "
      "and this run advantage-weighted ELBO. A larger objective.lambda_ makes "
      "the gap act."
    )
  folder = run.workdir
  writer.say(
    f"In {run.home.address}: metrics.jsonl, samples/, checkpoints/"
    + (", tensorboard/" if settings.run.tensorboard else "")
    + (f", {exported}" if settings.run.export else "")
    + "."
  )
  writer.say("Next:")
  writer.say(f"  python -m rspo_jax.report {folder} --out=report.html")
  if settings.run.export:
    writer.say(f"  python -m rspo_jax.demo --model={folder / 'model'}")
  writer.say("  the same command with --mode=eval --config.eval.split=test")


def lambda_share(run: Run) -> float | None:
  """Mean of gap/lambda_share over the run's rows; None without a lambda."""
  if not run.settings.objective.lambda_:
    return None
  shares = [
    row["gap/lambda_share"]
    for row in metrics.read_rows(run.writer.path)
    if row.get("gap/lambda_share") is not None
  ]
  return float(np.mean(shares)) if shares else None


def _load_evaluated(run: Run) -> str:
  """Loads what is to be evaluated: DIR's last checkpoint, or model.path.

  Returns:
    Its name.

  Raises:
    ValueError: there is neither, or the checkpoint cannot be used.
  """
  folder = run.home.address / "checkpoints"
  path = run.settings.model["path"]
  before = settings_lib.read_config(run.home.address)
  if before is not None and before["model"].get("path") == path:
    with Checkpointer(folder) as checkpointer:
      try:
        template = functools.partial(_template, run.program)
        restored = checkpointer.restore(template)
      except CheckpointError as error:
        raise ValueError(str(error)) from error
    if restored is not None:
      for message in restored.messages:
        run.writer.warn(message)
      run.state, run.step = restored.state, restored.step
      run.saved_step = run.step
      return f"{folder} at step {restored.step}"
  if not path:
    raise ValueError(
      f"--workdir={run.home.address} holds no checkpoint and model.path is empty: "
      "there is nothing to evaluate; give one of them."
    )
  return path


def evaluate_only(run: Run, source: str) -> int:
  """Evaluates and prints one line an evaluation; writes DIR/eval/ alone."""
  settings, folder = run.settings, run.workdir / "eval"
  for evaluation in settings.evaluations:
    length = evaluation.greedy.completion_length
    parts = [settings.eval.split, str(length), evaluation.name]
    parts = [*filter(None, parts), f"step{run.step:06d}"]
    stem = folder / "-".join(parts)
    try:
      values = run.evaluate(stem, evaluation)
    except Interrupted:
      return INTERRUPTED
    line = {
      "model": source,
      "split": settings.eval.split,
      "step": run.step,
      "completion_length": length,
      "sampler": scores.sampler_name(evaluation.greedy),
      "temperature": evaluation.sampled.temperature,
      "samples": settings.eval.samples,
      "seed": evaluation.seed,
      "task": settings.task["name"],
      "protocol": settings.task["protocol"],
    }
    line |= values | {"by_difficulty": run.by_difficulty}
    if run.main_process:
      write_json(folder / f"{stem.name}.json", line)
      print(json.dumps(line), flush=True)
      if settings.eval.d1_files:
        texts = [row["completion"] for row in run.greedy_rows]
        name, document = scores.d1_document(
          settings.task["name"],
          run.eval_prompts.examples,
          [run.prompt_text(i) for i in range(len(texts))],
          texts,
          evaluation.greedy,
          source,
        )
        (folder / "d1" / evaluation.name).mkdir(parents=True, exist_ok=True)
        write_json(folder / "d1" / evaluation.name / name, document)
  if run.main_process and len(settings.evaluations) > 1:
    run.writer.table(scores.table(scores.read([folder])))
  return DONE
