"""Checkpoints of a run: what is saved, restored, and refused."""

import functools
import time

from rspo_jax.run import incident, state
from rspo_jax.run import program as program_lib
from rspo_jax.run.runs import Run
from rspo_jax.storage.checkpoint import (
  Checkpointer,
  CheckpointMismatch,
)


def open_checkpoints(run: Run) -> Checkpointer:
  """The checkpoints of a run, wherever it lives."""
  settings = run.settings.run
  return Checkpointer(
    run.home.address / "checkpoints",
    keep_last=settings.keep_checkpoints,
    keep_every=settings.keep_every,
    keep_best=settings.keep_best,
  )


def save(
  run: Run, checkpointer: Checkpointer, score: float | None = None
) -> None:
  """Saves the run as it stands, once a step.

  Raises:
    incident.IncidentError: an update overflowed; checkpoints are left alone.
  """
  if run.saved_step == run.state.step:
    return
  start = time.perf_counter()
  check_state(run)
  # First: a checkpoint must not know rows that the bucket does not have.
  run.mirror()
  checkpointer.save(
    run.state.step, run.state.arrays(), run.state.record(), score
  )
  run.saved_step = run.state.step
  run.state.count_seconds("time/save_s", time.perf_counter() - start)


def check_state(run: Run) -> None:
  """Refuses to save numbers that are not finite.

  Raises:
    incident.IncidentError: an update overflowed.
  """
  if not program_lib.is_finite(run.state.train):
    raise incident.IncidentError(
      f"After step {run.state.step} parameters or moments are not finite: "
      "nothing is saved over the earlier checkpoints. Lower "
      "optimizer.learning_rate or optimizer.clip_norm."
    )


def restore(run: Run, checkpointer: Checkpointer, batches) -> None:
  """Sets the run to its newest good checkpoint, or to the start.

  Raises:
    CheckpointMismatch: the run is past the last step that is asked for.
  """
  writer, settings = run.writer, run.settings
  restored = checkpointer.restore(
    functools.partial(state.template, run.program)
  )
  steps = settings.run.steps
  if restored is None:
    run.state.train = program_lib.fresh_state(run.program)
    messages = writer.truncate_to(-1)
  else:
    if restored.step > steps:
      raise CheckpointMismatch(
        f"run.steps={steps}, but the run has reached step {restored.step}; "
        "use at least that, or another --workdir."
      )
    run.state = state.from_checkpoint(
      restored.step,
      restored.state,
      restored.extra,
      batches if settings.rollout.stale_steps else None,
    )
    run.saved_step = restored.step
    rows = restored.step - (run.state.pending is not None)
    messages = restored.messages + writer.truncate_to(rows)
    writer.say(f"Going on from step {restored.step} of {steps}.")
  for message in messages:
    writer.warn(message)


def give_up(run: Run, checkpointer: Checkpointer) -> None:
  """Ends a run whose last steps were not finite, at its last good state.

  Steps that are not applied leave parameters and moments alone, so the last
  good state is still at hand, under a later number.

  Raises:
    incident.IncidentError: always.
  """
  current = run.state
  count = current.tally.in_a_row
  step = current.step - count
  kept = "the checkpoints before them are kept"
  if not current.tally.applied:
    check_state(run)
    # One update a step, or several.
    updates = int(current.train.step)
    behind = updates - updates * step // current.step
    current.step = step
    current.computed -= current.tally.wasted
    current.tally.not_finite -= count
    current.tally.in_a_row = current.tally.wasted = 0
    if run.saved_step != step:
      # What was sampled since is of later steps.
      current.ahead = None
      current.train = current.train.replace(step=current.train.step - behind)
      checkpointer.save(step, current.arrays(), current.record())
    checkpointer.wait()
    kept = f"the last good state, of step {step}, is saved"
  raise incident.IncidentError(
    f"{count} steps in a row up to step {step + count} were not finite; "
    f"{kept}. What they were made of is in {run.workdir / incident.FOLDER}. "
    "Look there for the culprit; run.non_finite_limit=0 goes on regardless."
  )
