"""Masked-diffusion supervised training on Countdown, from scratch.

    python -m rspo_jax.main --config=configs/sft_countdown.py

How the embedded checkpoint was made, in two runs: the parent on clean
demonstrations, then the base, which continues from the parent on
demonstrations of mixed quality:

    python -m rspo_jax.main --config=configs/sft_countdown.py --workdir=PARENT
    python -m rspo_jax.main --config=configs/sft_countdown.py:mixed \
        --config.model.path=PARENT/model

Arguments: `mixed` (the second run), `smoke` (seconds).
"""

from configs import base


def _mixed(config):
  """Continues a parent on mixed-quality demonstrations, for a short while."""
  config.model.path = "PARENT/model"  # refused until the caller names one
  config.data.corrupt_share = 0.65
  config.optimizer.learning_rate = 3e-4
  config.optimizer.warmup_steps = 20
  config.run.steps = 300


def _smoke(config):
  config.data.size = "small"
  config.run.steps = 10
  config.eval.prompts = 64
  config.eval.batch = 64


SWITCHES = {"mixed": _mixed, "smoke": _smoke}


def supervised(config):
  """The settings that every supervised run shares."""
  config.objective.name = "sft"
  config.objective.lambda_ = 0.0
  config.objective.centring = "none"
  config.likelihood.scheme = "uniform"
  config.likelihood.masks = 1
  config.data.size = "large"
  config.rollout.prompts = 128
  config.rollout.group_size = 1
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 100
  config.optimizer.final_share = 0.02
  config.optimizer.b2 = 0.98
  config.optimizer.weight_decay = 0.01
  config.run.checkpoint_every = 1000
  config.eval.every = 2000
  config.run.samples_every = 0


def get_config(arg: str = ""):
  """Returns the config of the parent (clean demonstrations)."""
  config = base.get_config()
  supervised(config)
  config.task.name = "countdown"
  config.likelihood.scope = "canvas"
  numbers = " ".join(str(number) for number in range(101))
  config.model.new.vocabulary = f"{numbers} + - * / ( ) , ="
  config.model.new.pattern = r"\d+|\D"
  config.run.steps = 14000
  return base.apply(config, arg, SWITCHES)
