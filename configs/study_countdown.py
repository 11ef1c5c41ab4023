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
COUNTDOWN = study.Study(
  task=countdown.get_config,
  budget=2880,  # 120 steps of RSPO
  seeds=(0, 1, 2),
  rates={},
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
  stale = {"rollout.stale_steps": 1}
  entries.append(COUNTDOWN.final("rspo-stale", "", stale, "rspo"))
  return entries
