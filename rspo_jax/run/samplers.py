"""The samplers of a config: of training rollouts and of evaluations.

Without JAX, so that options which do not fit together are refused at once.
"""

from rspo_jax.config import schema
from rspo_jax.sampling.settings import SamplerSettings, validate


def of_rollouts(c: schema.Config) -> SamplerSettings:
  """How training rollouts are sampled."""
  keys = c.sampler
  steps = keys.steps or keys.completion_length
  shape = (keys.completion_length, keys.block_length, steps)
  return _sampler(keys, *shape, c.rollout.temperature, "sampler")


def of_evaluation(
  c: schema.Config, length: int, temperature: float
) -> SamplerSettings:
  """How an evaluation at a completion length samples."""
  keys, own = c.sampler, c.eval
  block = own.block_length or min(keys.block_length, length)
  most = keys.steps or keys.completion_length
  steps = own.steps or max(1, most * length // keys.completion_length)
  return _sampler(keys, length, block, steps, temperature, "eval")


def _sampler(
  keys: schema.Sampler, length, block, steps, temperature, group
) -> SamplerSettings:
  """The sampler's options at a length; errors name the keys of the group."""
  result = SamplerSettings(
    completion_length=length,
    block_length=block,
    steps=steps,
    temperature=float(temperature),
    remasking=keys.remasking,
    algorithm=keys.algorithm,
    cfg_scale=keys.cfg_scale,
    # 1 and 0 keep every token, 0 switches off: no key is ever null.
    top_p=None if keys.top_p == 1 else keys.top_p,
    top_k=keys.top_k or None,
    cache=keys.cache,
    threshold=keys.threshold or None,
    factor=keys.factor or None,
    stop_at_eos=keys.stop_at_eos,
    order_temperature=keys.order_temperature,
  )
  try:
    validate(result)
  except ValueError as error:
    # Evaluation has keys of its own for these.
    text = str(error)
    for key in ("completion_length", "block_length", "steps"):
      text = text.replace(f"sampler.{key}", f"{group}.{key}")
    raise ValueError(text) from error
  return result
