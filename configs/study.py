"""The study: every objective at equal tuning and equal compute, on Sudoku.

    python launch/sweep.py --config=configs/study.py --out=runs/study --filter=tune
    python -m rspo_jax.main --config=configs/study.py:espo

Arguments: as in configs/countdown.py. On Countdown: configs/study_countdown.py.

1. `tune-*`: three learning rates for every objective, one seed that no final
   run has, on validation. `RATES` below holds what they chose.
2. `final-*`: every objective at its rate and RSPO's ablations, cached and
   threshold rollouts among them, five seeds, the test split, once.

A run lasts as many steps as its budget of forwards of a completion pays for,
rollout included (`compute/forward_equivalents`; a backward pass counts two), so
that objectives with several updates a rollout, or many masks, take fewer steps.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from configs import base, countdown, recipes, sudoku

TUNED = (1e-4, 3e-4, 1e-3)
TUNING_SEED = 100
# What each objective evaluates beside the policy's gradient.
SCORES_REFERENCE = ("rspo", "rft", "vrpo", "trafl")
SCORES_REFERENCE_FOR_KL = ("diffu_grpo", "espo", "gdpo", "sapo")
HAS_RATIO = ("diffu_grpo", "espo", "gdpo", "tracerl", "justgrpo", "sapo")


def forwards(config) -> float:
  """Forwards of a completion in one step, nothing dropped."""
  name = config.objective.name
  updates = config.train.updates_per_rollout
  length = config.sampler.completion_length
  steps = config.sampler.steps or length
  masks = config.likelihood.masks
  if not masks:
    masks = -(-min(steps, length) // config.likelihood.shrink)
  each = 3.0 + (name in SCORES_REFERENCE)
  each += name in SCORES_REFERENCE_FOR_KL and config.objective.kl_weight > 0
  old = updates > 1 or config.rollout.stale_steps > 0
  each += name in HAS_RATIO and old
  # The whole batch fits no micro-batch: the policy is scored beforehand.
  each += name == "rspo" and config.objective.centring == "batch"
  finishes = config.objective.sapo.finishes if name == "sapo" else 0
  # A partial canvas is on average half finished.
  return steps * (1 + finishes / 2) + updates * masks * each


@dataclasses.dataclass(frozen=True)
class Study:
  """One task's runs at equal tuning and equal compute.

  Attributes:
    task: gives the config of a run by its argument.
    budget: forwards of one completion that a run may spend.
    seeds: of the final runs.
    rates: chosen by the tuning runs, by name.
  """

  task: Callable[[str], object]
  budget: float
  seeds: Sequence[int]
  rates: Mapping[str, float]

  def affordable(self, config) -> int:
    """Steps that the budget pays for."""
    return max(1, round(self.budget / forwards(config)))

  def config(self, arg: str = ""):
    """The config of a run; its length follows its objective."""

    def paid(switch):
      def apply(config):
        switch(config)
        config.run.steps = self.affordable(config)

      return apply

    switches = {
      name: switch if name == "smoke" else paid(switch)
      for name, switch in countdown.SWITCHES.items()
    }
    config = self.task("")
    config.eval.prompts = 1024
    config.run.samples_every = 0
    config.run.export = False
    config.run.steps = self.affordable(config)
    return base.apply(config, arg, switches)

  def entry(self, name: str, arg: str, overrides: Mapping, seeds=None) -> dict:
    """An entry of a sweep; what it overrides may change its length."""
    config = self.config(arg)
    config.update_from_flattened_dict(dict(overrides))
    steps = {"run.steps": self.affordable(config)}
    return {
      "name": name,
      "arg": arg,
      "overrides": steps | dict(overrides),
      "seeds": self.seeds if seeds is None else seeds,
    }

  def tuning(self, name: str, arg: str = "", overrides=None) -> list[dict]:
    """Runs of every rate with the tuning seed, on validation."""
    return [
      self.entry(
        f"tune-{name}-{rate:g}",
        arg,
        dict(overrides or {}) | {"optimizer.learning_rate": rate},
        (TUNING_SEED,),
      )
      for rate in TUNED
    ]

  def final(self, name: str, arg: str = "", overrides=None, rate_of="") -> dict:
    """The run at its own rate, or another's, on the test split."""
    rate = self.rates.get(rate_of or name, TUNED[0])
    own = {"eval.split": "test", "optimizer.learning_rate": rate}
    return self.entry(f"final-{name}", arg, own | dict(overrides or {}))


OBJECTIVES = ("rspo", "rft", *recipes.SWITCHES)
# The highest mean of greedy and sampled accuracy of the tuning runs.
SUDOKU = Study(
  task=sudoku.get_config,
  budget=1200,  # 50 steps of RSPO
  seeds=(0, 1, 2, 3, 4),
  rates={
    "rspo": 3e-4,
    "rft": 3e-4,
    "diffu_grpo": 1e-4,
    "sapo": 1e-4,
    "wd1": 1e-4,
    "espo": 1e-4,
    "spg": 1e-4,
    "gdpo": 1e-4,
    "vrpo": 3e-4,
    "tracerl": 3e-4,
    "justgrpo": 3e-4,
    "trafl": 1e-4,
    "rspo-lambda_0": 1e-4,
    "rspo-lambda_1": 1e-4,
    "rspo-lambda_10": 1e-3,
  },
)
# RSPO with lambdas that get a rate of their own: the gap against lambda = 0 is
# a comparison of two methods, each at its best.
LAMBDAS = {
  "lambda_0": {"objective.lambda_": 0.0},
  "lambda_1": {"objective.lambda_": 1.0, "objective.lambda_unit": "token"},
  "lambda_10": {"objective.lambda_": 10.0, "objective.lambda_unit": "token"},
}
# Beside the ablation of configs/countdown.py, at RSPO's rate.
VARIANTS = {
  # The same steps on cheaper rollouts; what they save is in the metrics.
  "cache_dual": {"sampler.cache": "dual"},
  "threshold_0.9": {"sampler.threshold": 0.9},
  # On completions of the parameters one update before.
  "stale": {"rollout.stale_steps": 1},
  # Groups that are all right push as in rejection sampling.
  "solved": {"objective.solved_advantage": 1.0},
  "solved-lambda_0": {
    "objective.solved_advantage": 1.0,
    "objective.lambda_": 0.0,
  },
  # As many steps as the dropped groups leave forwards for.
  "spent": {"run.steps": 67},
}


def get_config(arg: str = ""):
  """Returns the config of a run; its length follows its objective."""
  return SUDOKU.config(arg)


def sweep():
  """Tuning runs, then final ones."""
  args = {name: "" if name == "rspo" else name for name in OBJECTIVES}
  entries = []
  for name, arg in args.items():
    entries += SUDOKU.tuning(name, arg)
  for name, overrides in LAMBDAS.items():
    entries += SUDOKU.tuning(f"rspo-{name}", "", overrides)
  entries += [SUDOKU.final(name, arg) for name, arg in args.items()]
  changes = {
    entry["name"]: entry["overrides"]
    for entry in countdown.ablation(())
    if entry["name"] not in args
  }
  for name, overrides in (changes | VARIANTS).items():
    entries.append(SUDOKU.final(f"rspo-{name}", "", overrides, "rspo"))
  for name, overrides in LAMBDAS.items():
    own = f"rspo-{name}"
    entries.append(SUDOKU.final(f"{own}-tuned", "", overrides, own))
  return entries
