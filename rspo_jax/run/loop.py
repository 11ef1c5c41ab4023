"""The one loop: build, jit with shardings, run, log, save, resume.

What a step does is in step.py.
"""

import contextlib
import os
import sys
import traceback

import jax

from rspo_jax.config import identity
from rspo_jax.devices import processes, workers
from rspo_jax.devices.interrupt import Interrupt
from rspo_jax.reporting import metrics, profiler
from rspo_jax.run import (
  data,
  demonstrations,
  evaluate,
  evaluations,
  incident,
  preflight,
  resume,
  step,
  summary,
)
from rspo_jax.run import program as program_lib
from rspo_jax.run import settings as settings_lib
from rspo_jax.run import workdir as workdir_lib
from rspo_jax.run.runs import Interrupted, Run
from rspo_jax.run.state import RunState
from rspo_jax.storage import mirror
from rspo_jax.storage.checkpoint import (
  Checkpointer,
  CheckpointError,
  CheckpointMismatch,
)

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
    identity.check_workdir(workdir, resolved, mode)
    home = mirror.Home(workdir)
    if mode == "train" and identity.is_finished(
      home.address, settings.run.steps
    ):
      print(f"This run is finished: {home.address / identity.SUMMARY}")
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
        preflight.check_memory(settings)
      program = program_lib.build(settings)
      run = Run(
        program,
        RunState(settings.objective.lambda_),
        home,
        writer,
        interrupt,
        resolved,
        evaluate.prompts_of(
          program, settings.eval.split, settings.eval.prompts
        ),
      )
      if mode == "eval":
        source = evaluations.load_evaluated(run)
      else:
        preflight.check_disk(run.program, home.address)
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
      evaluations.evaluate_all(run, source)
      return DONE
    return train(run, batches)
  except Interrupted:
    return INTERRUPTED
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
  prompts = program.prompts(
    data.load_examples(program.task, "train", settings.data)
  )
  where = (settings.rollout.prompts, settings.run.seed)
  if settings.supervised:
    batches = demonstrations.demonstration_batches(
      prompts,
      program.task,
      program.model.tokenizer.encode,
      *where,
      completion_length=settings.sampler.completion_length,
      eos_id=program.model.config.eos_id,
      corrupt_share=settings.data.corrupt_share,
      rows=run.split.held,
    )
  else:
    batches = data.prompt_batches(prompts, *where, rows=run.split.held)
  batches[0]
  return data.Ahead(batches, settings.run.steps)


def train(run: Run, batches) -> int:
  """Trains to the last step, from the newest good checkpoint if any.

  A step's row of metrics is written when its evaluation, where one is due, is
  done; until then its values wait in `RunState.pending`, in a checkpoint too,
  so that a run that is interrupted in between gets the same row.
  """
  writer, steps = run.writer, run.settings.run.steps
  with (
    resume.open_checkpoints(run) as checkpointer,
    contextlib.closing(batches),
  ):
    resume.restore(run, checkpointer, batches)
    workdir_lib.take_config(run)
    writer.debug(summary.described(run))
    profile = profiler.Profiler(
      run.workdir / "profile",
      run.settings.run.profile if run.main_process else 0,
      writer.table,
      writer.warn,
    )
    try:
      while True:
        if run.state.pending is not None:
          _end_of_step(run, checkpointer)
        if run.state.step == steps:
          break
        run.stop_if_asked()
        with profile.step():
          run.state.pending = step.train(run, batches)
        writer.debug(summary.timed(run.state.step, run.state.pending))
    except Interrupted:
      pass
    profile.close()
    if run.state.step < steps or run.state.pending is not None:
      resume.save(run, checkpointer)
      checkpointer.wait()
      writer.say("Saved; the same command goes on from here.")
      return INTERRUPTED
  summary.finish(run)
  return DONE


def _end_of_step(run: Run, checkpointer: Checkpointer) -> None:
  """What is due after a step, or before the first: evaluation, row, save.

  Raises:
    Interrupted: a signal came; the row is still to be written.
  """
  settings, state = run.settings.run, run.state
  score, every = None, run.settings.eval.every
  if state.step in (0, settings.steps) or (every and state.step % every == 0):
    run.stop_if_asked()
    stem = run.workdir / "samples" / f"eval-{state.step:06d}"
    state.pending |= evaluate.evaluate(run, stem)[0]
    score = state.pending["eval/accuracy"]
  try:
    run.writer.write(state.step, state.pending)
  except metrics.NonFiniteMetric:
    # Said, and kept in incident/, when the step was made.
    if not state.tally.in_a_row:
      raise
  state.pending = None
  limit = settings.non_finite_limit
  if limit and state.tally.in_a_row >= limit:
    resume.give_up(run, checkpointer)
  if (
    state.step == settings.steps
    or (settings.keep_best and score is not None)
    or (state.step and state.step % settings.checkpoint_every == 0)
  ):
    resume.save(run, checkpointer, score)
