"""RSPO on Countdown: three numbers, each used once, reach a target.

    python -m rspo_jax.main --config=configs/countdown.py
    python -m rspo_jax.main --config=configs/countdown.py:smoke

Arguments: `smoke` (seconds), `calibrated` (default: lambda 3 nats per token, of
the large models 0.01 per sequence), `paper_literal` (lambda 0.01 per token),
`rft` (rejection sampling, the control run); `llada_8b`, `dream_7b` (with
`model.path` naming the checkpoint's folder: an adapter of rank 64, as in
configs/gsm8k.py), after either of them `full` (all parameters); and, last, the
objectives of configs/recipes.py: `diffu_grpo`, `sapo`, `wd1`, `espo`, `spg`, `gdpo`,
`vrpo`, `tracerl`, `justgrpo`, `trafl`.

    python -m rspo_jax.main --config=configs/countdown.py:llada_8b \\
        --config.model.path=LLADA
"""

from configs import base, gsm8k, recipes


def _smoke(config):
  config.run.steps = 6
  config.rollout.prompts = 16
  config.eval.prompts = 128
  config.eval.batch = 128
  config.run.checkpoint_every = 3


def _calibrated(config):
  if config.model.published:
    gsm8k.SWITCHES["calibrated"](config)
  else:
    config.objective.lambda_, config.objective.lambda_unit = 3.0, "token"


def _paper_literal(config):
  config.objective.lambda_, config.objective.lambda_unit = 0.01, "token"


def _rft(config):
  config.objective.name = "rft"


def _large(name):
  """The switch of a published model, on a task that has a tiny one."""

  def switch(config):
    gsm8k.real_model(config)
    config.model.path = ""
    config.data.prompt_length = 256
    config.optimizer.schedule = "constant"
    gsm8k.SWITCHES[name](config)

  return switch


SWITCHES = {
  "smoke": _smoke,
  "calibrated": _calibrated,
  "paper_literal": _paper_literal,
  "rft": _rft,
  "llada_8b": _large("llada_8b"),
  "dream_7b": _large("dream_7b"),
  "full": gsm8k.full,
  **recipes.SWITCHES,
}


def get_config(arg: str = ""):
  """Returns the config of the main job."""
  config = base.get_config()
  config.model.path = "embedded:countdown"
  config.task.name = "countdown"
  config.rollout.prompts = 48
  config.rollout.temperature = 1.3
  config.likelihood.masks = 4
  config.likelihood.scope = "canvas"
  config.objective.skip_equal_groups = True
  config.optimizer.learning_rate = 3e-4
  config.optimizer.schedule = "linear"
  config.run.steps = 120
  _calibrated(config)
  return base.apply(config, arg, SWITCHES)


def ablation(seeds):
  """The paper's ablation around a task's config, as entries of a sweep.

  `rspo` is the config as it stands; every other entry changes one thing.
  Lambda covers four decades; `paper_literal` reads the paper's 0.01 per token.

  Args:
    seeds: values of run.seed, a run each.

  Returns:
    dicts with name, overrides and seeds (rspo_jax/tools/sweep/entries.py).
  """
  changes = {
    "rspo": {},
    # Does the gap do anything? And against imitating what was right?
    "lambda_0": {"objective.lambda_": 0.0},
    "rft": {"objective.name": "rft"},
  }
  for name, value in (
    ("paper_literal", 0.01),
    ("lambda_0.1", 0.1),
    ("lambda_1", 1.0),
    ("lambda_10", 10.0),
    ("lambda_100", 100.0),
  ):
    changes[name] = {
      "objective.lambda_": value,
      "objective.lambda_unit": "token",
    }
  changes |= {
    "centring_batch": {"objective.centring": "batch"},
    "centring_none": {"objective.centring": "none"},
    "no_reference": {"objective.subtract_reference": False},
    "reference_25": {"objective.reference_every": 25},
    "lambda_share": {"objective.lambda_share": 0.5},
    "masks_4": {"likelihood.masks": 4},
    "masks_8": {"likelihood.masks": 8},
    "leave_one_out": {
      "likelihood.masks": 4,
      "objective.gap_masks": "leave_one_out",
    },
  }
  for scheme in ("uniform", "stratified", "fixed_count"):
    changes[f"scheme_{scheme}"] = {"likelihood.scheme": scheme}
  return [
    {"name": name, "overrides": overrides, "seeds": seeds}
    for name, overrides in changes.items()
  ]


def sweep():
  """The runs of launch/sweep.py: the ablation over three seeds."""
  return ablation(seeds=(0, 1, 2))
