"""What each objective of another paper comes with, as config arguments.

    python -m rspo_jax.main --config=configs/countdown.py:espo

Objective, masks and updates per rollout are the recipe's; prompts, group size,
rates and steps stay the task's, so that comparisons share them. Sources and
how sure they are: docs/method.md. Where a program was read the values are that
program's; vrpo and trafl are from memory or notes and no paper's settings.
"""

SHORT = 64  # completions below this length get the exact form of quadratures


def _set(config, name, scheme, masks, scope, **changes):
  """Sets the keys that every recipe names, and its own."""
  objective, likelihood = config.objective, config.likelihood
  objective.name = name
  likelihood.scheme, likelihood.masks = scheme, masks
  likelihood.scope = scope
  objective.normalize_advantages = changes.pop("normalize", False)
  config.train.updates_per_rollout = changes.pop("updates", 1)
  likelihood.shrink = changes.pop("shrink", 1)
  objective.kl_weight = changes.pop("kl_weight", 0.0)
  objective.skip_equal_groups = changes.pop(
    "skip_equal_groups", objective.skip_equal_groups
  )
  own = objective.get(name, {})
  for key, value in changes.items():
    (own if key in own else objective)[key] = value


def _short(config):
  return config.sampler.completion_length < SHORT


def _puzzle(config):
  return config.task.name in ("countdown", "sudoku")


def diffu_grpo(config):
  """d1: eight updates a rollout on planning tasks, else twelve."""
  updates = 8 if _puzzle(config) else 12
  _set(
    config,
    "diffu_grpo",
    "mean_field",
    1,
    "masked_tail",
    clip=0.5,
    kl_weight=0.04,
    updates=updates,
  )


def sapo(config):
  """SAPO: d1's with a process reward; its numbers are not published."""
  diffu_grpo(config)
  config.objective.name = "sapo"
  config.objective.sapo.finishes = 1


def wd1(config):
  """wd1: no ratio, no reference."""
  _set(config, "wd1", "mean_field", 1, "masked_tail")


def espo(config):
  """ESPO: two coupled pairs on the whole canvas, eight updates a rollout."""
  weights = {"countdown": 0.003, "sudoku": 0.01}
  _set(
    config,
    "espo",
    "coupled",
    4,
    "canvas",
    kl_weight=weights.get(config.task.name, 0.001),
    clip=0.0 if config.task.name == "countdown" else 0.2,
    updates=8,
  )


def spg(config):
  """SPG: mixture of bounds, two blocks, four updates a rollout."""
  _set(
    config,
    "spg",
    "block_random",
    2,
    "masked_tail",
    negative_score="mix",
    bound_mix=0.5,
    bound_power=1.0 if config.task.name == "sudoku" else 1.5,
    updates=4,
  )


def gdpo(config):
  """Group Diffusion PO: three Gauss nodes, as published where long enough."""
  scheme = "gauss" if _short(config) else "gauss_floor"
  _set(config, "gdpo", scheme, 3, "completion", clip=0.5)


def vrpo(config):
  """VRPO on pairs of the on-policy group: an adaptation."""
  _set(
    config,
    "vrpo",
    "uniform",
    8,
    "completion",
    beta=0.2,
    sft_weight=0.05,
    skip_equal_groups=True,
  )


def tracerl(config):
  """TraceRL: the sampler's own steps, eight of them to a canvas."""
  _set(
    config,
    "tracerl",
    "trace",
    0,
    "completion",
    clip=0.2,
    kl_weight=0.01,
    kl_reduction="sum",
    shrink=1 if _short(config) else 8,
    skip_equal_groups=True,
  )


def justgrpo(config):
  """JustGRPO: sampled and scored from left to right."""
  _set(
    config,
    "justgrpo",
    "trace",
    0,
    "canvas",
    clip=0.2,
    normalize=True,
    skip_equal_groups=True,
  )
  config.sampler.block_length = 1
  config.sampler.steps = 0


def trafl(config):
  """TraFL: two complementary pairs."""
  _set(config, "trafl", "complementary", 4, "completion", beta=1.0)


SWITCHES = {
  "diffu_grpo": diffu_grpo,
  "sapo": sapo,
  "wd1": wd1,
  "espo": espo,
  "spg": spg,
  "gdpo": gdpo,
  "vrpo": vrpo,
  "tracerl": tracerl,
  "justgrpo": justgrpo,
  "trafl": trafl,
}
