"""Masked-diffusion supervised training on 4x4 Sudoku, from scratch.

    python -m rspo_jax.main --config=configs/sft_sudoku.py

The embedded checkpoint is made in the same two runs as Countdown's
(configs/sft_countdown.py): a clean parent, then `:mixed` from its model/.
"""

from configs import base, sft_countdown


def get_config(arg: str = ""):
  """Returns the config of the parent (clean demonstrations)."""
  config = base.get_config()
  sft_countdown.supervised(config)
  config.task.name = "sudoku"
  config.data.prompt_length = 16
  config.sampler.completion_length = 16
  config.sampler.block_length = 16
  config.sampler.steps = 16
  config.model.new.width = 64
  config.model.new.heads = 2
  config.model.new.kv_heads = 2
  config.model.new.mlp_width = 192
  config.optimizer.learning_rate = 3e-3
  config.run.steps = 2500
  return base.apply(config, arg, sft_countdown.SWITCHES)
