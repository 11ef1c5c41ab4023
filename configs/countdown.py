"""RSPO on Countdown: three numbers, each used once, reach a target.

    python -m rspo_jax.main --config=configs/countdown.py
    python -m rspo_jax.main --config=configs/countdown.py:smoke

Arguments: `smoke` (seconds), `calibrated` (default: lambda 3 nats per token),
`paper_literal` (lambda 0.01 per token), `rft` (rejection sampling, the
control run).
"""

from configs import base


def _smoke(config):
  config.run.steps = 6
  config.rollout.prompts = 16
  config.eval.prompts = 128
  config.eval.batch = 128
  config.run.checkpoint_every = 3


def _calibrated(config):
  config.objective.lambda_, config.objective.lambda_unit = 3.0, "token"


def _paper_literal(config):
  config.objective.lambda_, config.objective.lambda_unit = 0.01, "token"


def _rft(config):
  config.objective.name = "rft"


SWITCHES = {
  "smoke": _smoke,
  "calibrated": _calibrated,
  "paper_literal": _paper_literal,
  "rft": _rft,
}


def get_config(arg: str = ""):
  """Returns the config of the main job."""
  config = base.get_config()
  config.model.path = "embedded:countdown"
  config.task.name = "countdown"
  config.rollout.prompts = 48
  config.rollout.temperature = 1.3
  config.likelihood.scope = "canvas"
  config.objective.skip_equal_groups = True
  config.optimizer.learning_rate = 3e-4
  config.run.steps = 150
  _calibrated(config)
  return base.apply(config, arg, SWITCHES)
