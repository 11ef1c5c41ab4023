"""The benchmarks, by name, and tasks of the user's own."""

import functools

from rspo_jax.config import names
from rspo_jax.tasks import base, countdown, gsm8k, gym, math500, own, sudoku

TASKS: dict[str, base.Task] = {
  task.name: task
  for task in (countdown.TASK, sudoku.TASK, gsm8k.TASK, math500.TASK)
}


@functools.cache
def find(name: str, settings: own.RewardSettings | None = None) -> base.Task:
  """Returns a task by name.

  Args:
    name: key of `TASKS`, `reasoning_gym:NAME` (see `gym`), or
      `module:function` (see `own`).
    settings: of users' functions.

  Raises:
    ValueError: no such task; the nearest name is offered.
  """
  settings = settings or own.RewardSettings()
  if name.startswith(gym.PREFIX):
    task = gym.make_task(name, settings)
  elif ":" in name:
    task = own.make_task(name, settings)
  elif name in TASKS:
    task = TASKS[name]
  else:
    hint = names.did_you_mean(name, TASKS)
    raise ValueError(
      f"task.name={name!r} is not known; {hint}choose from"
      f" {', '.join(sorted(TASKS))}, {gym.PREFIX}NAME for a generator of"
      " reasoning-gym, or module:function for a reward of your own."
    )
  return own.with_extra(task, settings) if settings.extra else task
