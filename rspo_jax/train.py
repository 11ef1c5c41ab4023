"""The one loop: build, jit with shardings, run, log, save, resume.

What a step does is in rspo_jax/runs.py.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
import traceback
from typing import Any

import jax

from rspo_jax import (
  collapse,
  data,
  incident,
  metrics,
  mirror,
  processes,
  profiler,
  room,
  run_config,
  scores,
  summary,
  workers,
)
from rspo_jax import program as program_lib
from rspo_jax import settings as settings_lib
from rspo_jax import workdir as workdir_lib
from rspo_jax.checkpoint import (
  Checkpointer,
  CheckpointError,
  CheckpointMismatch,
)
from rspo_jax.interrupt import Interrupt
from rspo_jax.runs import Interrupted, Run, Sampled

DONE, MISTAKE, FAULT, INTERRUPTED = 0, 2, 3, 75
FAULTS = (
  metrics.NonFiniteMetric,
  metrics.MetricsError,
  mirror.MirrorError,
  CheckpointError,
  incident.IncidentError,
  workers.WorkersError,
)


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
    run_config.check_workdir(workdir, resolved, mode)
    home = mirror.Home(workdir)
    if mode == "train" and run_config.is_finished(
      home.address, settings.run.steps
    ):
      print(f"This run is finished: {home.address / run_config.SUMMARY}")
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

  with (
    writer,
    Interrupt(notify, settings.run.grace_s) as interrupt,
    contextlib.ExitStack() as stack,
  ):
    status = _guarded(settings, home, writer, interrupt, stack, resolved, mode)
  if jax.process_index() == 0:
    # What came after the last save, or says why the run ended.
    try:
      home.push("eval" if evaluating else "")
    except mirror.MirrorError as error:
      writer.fail(error)
      return FAULT
  return status


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


def _guarded(settings, home, writer, interrupt, stack, resolved, mode) -> int:
  """Prepares and runs; what goes wrong becomes an exit status.

  What is held until the end goes on the stack.
  """
  try:
    with writer.phase("preparing model and data"):
      if mode == "train":
        room.check_memory(settings)
      run = Run(program_lib.build(settings), home, writer, interrupt, resolved)
      if mode == "eval":
        source = _load_evaluated(run)
      else:
        room.check_disk(run.program, home.address)
        batches = open_batches(run)
        stack.enter_context(workdir_lib.held(run))
        workdir_lib.prepare(run)
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


def open_batches(run: Run):
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
    rows=run.split.held,
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
    workdir_lib.take_config(run)
    writer.debug(summary.described(run))

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
      writer.debug(summary.timed(run.step, pending))
    profile.close()
    if not last or pending is not None:
      save()
      checkpointer.wait()
      writer.say("Saved; the same command goes on from here.")
      return INTERRUPTED
  summary.finish(run)
  return DONE


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


def template_of(program: program_lib.Program, extra: dict[str, Any]):
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
  restored = checkpointer.restore(functools.partial(template_of, run.program))
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


def _load_evaluated(run: Run) -> str:
  """Loads what is to be evaluated: DIR's last checkpoint, or model.path.

  Returns:
    Its name.

  Raises:
    ValueError: there is neither, or the checkpoint cannot be used.
  """
  folder = run.home.address / "checkpoints"
  path = run.settings.model["path"]
  before = run_config.read_config(run.home.address)
  if before is not None and before["model"].get("path") == path:
    with Checkpointer(folder) as checkpointer:
      try:
        template = functools.partial(template_of, run.program)
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
    stem = scores.free_stem(folder / "-".join(parts), line)
    try:
      values = run.evaluate(stem, evaluation)
    except Interrupted:
      return INTERRUPTED
    line |= values | {"by_difficulty": run.by_difficulty}
    if run.main_process:
      workdir_lib.write_json(folder / f"{stem.name}.json", line)
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
        workdir_lib.write_json(folder / "d1" / evaluation.name / name, document)
  if run.main_process and len(settings.evaluations) > 1:
    run.writer.table(scores.table(scores.read([folder])))
  return DONE
