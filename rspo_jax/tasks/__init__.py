"""The benchmarks, by name."""

from rspo_jax.tasks import base, countdown, gsm8k, sudoku

TASKS: dict[str, base.Task] = {
  task.name: task for task in (countdown.TASK, sudoku.TASK, gsm8k.TASK)
}
