"""RSPO on 4x4 Sudoku with a unique solution.

    python -m rspo_jax.main --config=configs/sudoku.py
    python -m rspo_jax.main --config=configs/sudoku.py:smoke

Arguments: as in configs/countdown.py.
"""

from configs import base, countdown


def get_config(arg: str = ""):
  """Returns the config of the sudoku run."""
  config = base.get_config()
  config.model.path = "embedded:sudoku"
  config.task.name = "sudoku"
  config.data.prompt_length = 16
  config.sampler.completion_length = 16
  config.sampler.block_length = 16
  config.sampler.steps = 16
  config.rollout.prompts = 16
  config.objective.skip_equal_groups = True
  config.run.steps = 100
  countdown.SWITCHES["calibrated"](config)
  return base.apply(config, arg, countdown.SWITCHES)


def sweep():
  """The runs of launch/sweep.py: the ablation over five seeds."""
  return countdown.ablation(seeds=(0, 1, 2, 3, 4))
