"""The study on Countdown: RSPO, its lambdas, and three other objectives.

    python launch/sweep.py --config=configs/study_countdown.py --out=runs/study
    python -m rspo_jax.main --config=configs/study_countdown.py:espo

Arguments: as in configs/countdown.py. Rules and entries as in configs/study.py,
at a budget of the main job and with three seeds.
"""

from configs import countdown, study

TOKEN = {"objective.lambda_unit": "token"}
RUNS = {
  "rspo": ("", {}),
  "rspo-paper_literal": ("", TOKEN | {"objective.lambda_": 0.01}),
  "rspo-lambda_0": ("", {"objective.lambda_": 0.0}),
  "rspo-lambda_1": ("", TOKEN | {"objective.lambda_": 1.0}),
  "rft": ("rft", {}),
  "espo": ("espo", {}),
  "diffu_grpo": ("diffu_grpo", {}),
}
# At the rate of another run.
VARIANTS = {
  "stale": ("rspo", {"rollout.stale_steps": 1}),
  "solved": ("rspo", {"objective.solved_advantage": 1.0}),
  "lambda_1-solved": (
    "rspo-lambda_1",
    TOKEN | {"objective.lambda_": 1.0, "objective.solved_advantage": 1.0},
  ),
}
COUNTDOWN = study.Study(
  task=countdown.get_config,
  budget=2880,  # 120 steps of RSPO
  seeds=(0, 1, 2),
  rates={
    "rspo": 3e-4,
    "rspo-paper_literal": 3e-4,  # that of lambda_0: it was not tuned
    "rspo-lambda_0": 3e-4,
    "rspo-lambda_1": 3e-4,
    "rft": 1e-3,
    "espo": 1e-3,
    "diffu_grpo": 3e-4,
  },
)


def get_config(arg: str = ""):
  """Returns the config of a run; its length follows its objective."""
  return COUNTDOWN.config(arg)


def sweep():
  """Tuning runs, then final ones."""
  entries = []
  for name, run in RUNS.items():
    entries += COUNTDOWN.tuning(name, *run)
  entries += [COUNTDOWN.final(name, *run) for name, run in RUNS.items()]
  for name, (rate_of, overrides) in VARIANTS.items():
    entries.append(COUNTDOWN.final(f"rspo-{name}", "", overrides, rate_of))
  return entries
