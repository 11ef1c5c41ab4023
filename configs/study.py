"""The study: every objective at equal tuning and equal compute, on Sudoku.

    python launch/sweep.py --config=configs/study.py --out=runs/study --filter=tune
    python -m rspo_jax.main --config=configs/study.py:espo

Arguments: as in configs/countdown.py.

1. `tune-*`: three learning rates for every objective, one seed that no final
   run has, on validation. `RATES` below holds what they chose.
2. `final-*`: every objective at its rate and RSPO's ablations, cached and
   threshold rollouts among them, five seeds, the test split, once.

A run lasts as many steps as BUDGET forwards of a completion pay for, rollout
included (`compute/forward_equivalents`; a backward pass counts two), so that
objectives with several updates a rollout, or many masks, take fewer steps.
"""

from configs import base, countdown, recipes, sudoku

BUDGET = 1200  # forwards of one completion: 50 steps of RSPO
TUNED = (1e-4, 3e-4, 1e-3)
TUNING_SEED = 100
SEEDS = (0, 1, 2, 3, 4)
OBJECTIVES = ("rspo", "rft", *recipes.SWITCHES)
# Chosen by the tuning runs: the highest mean of greedy and sampled accuracy.
RATES: dict[str, float] = {
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
}
DEFAULT_RATE = 1e-4
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
  finishes = config.objective.finishes if name == "sapo" else 0
  # A partial canvas is on average half finished.
  return steps * (1 + finishes / 2) + updates * masks * each


def affordable(config) -> int:
  """Steps that BUDGET pays for."""
  return max(1, round(BUDGET / forwards(config)))


def _paid(switch):
  """A switch, after which the run is as long as it can afford."""

  def apply(config):
    switch(config)
    config.run.steps = affordable(config)

  return apply


SWITCHES = {
  name: switch if name == "smoke" else _paid(switch)
  for name, switch in countdown.SWITCHES.items()
}


def get_config(arg: str = ""):
  """Returns the config of a run; its length follows its objective."""
  config = sudoku.get_config()
  config.eval.prompts = 1024
  config.run.samples_every = 0
  config.run.export = False
  config.run.steps = affordable(config)
  return base.apply(config, arg, SWITCHES)


def _entry(name, arg="", overrides=None, seeds=SEEDS):
  """One entry; overrides that change the cost change the length too."""
  overrides = dict(overrides or {})
  config = get_config(arg)
  for key, value in overrides.items():
    group, _, field = key.partition(".")
    config[group][field] = value
  return {
    "name": name,
    "arg": arg,
    "overrides": overrides | {"run.steps": affordable(config)},
    "seeds": seeds,
  }


def sweep():
  """Tuning runs, then final ones."""
  args = {name: "" if name == "rspo" else name for name in OBJECTIVES}
  entries = [
    _entry(
      f"tune-{name}-{rate:g}",
      arg,
      {"optimizer.learning_rate": rate},
      (TUNING_SEED,),
    )
    for name, arg in args.items()
    for rate in TUNED
  ]
  final = {"eval.split": "test"}
  for name, arg in args.items():
    rate = RATES.get(name, DEFAULT_RATE)
    entries.append(
      _entry(f"final-{name}", arg, final | {"optimizer.learning_rate": rate})
    )
  rate = RATES.get("rspo", DEFAULT_RATE)
  for item in countdown.ablation(SEEDS):
    if item["name"] in ("rspo", "rft"):
      continue
    own = final | {"optimizer.learning_rate": rate} | dict(item["overrides"])
    entries.append(_entry(f"final-rspo-{item['name']}", "", own))
  # The same steps on cheaper rollouts; what they save is in the metrics.
  for name, cheaper in (
    ("cache_dual", {"sampler.cache": "dual"}),
    ("threshold_0.9", {"sampler.threshold": 0.9}),
  ):
    own = final | {"optimizer.learning_rate": rate} | cheaper
    entries.append(_entry(f"final-rspo-{name}", "", own))
  return entries
