"""The defaults of every key as a ConfigDict, and how switches are applied.

Keys, meanings and ranges are said once, in rspo_jax/config/schema.py; task
files state only differences. `--config.GROUP.KEY=VALUE` overrides one.
"""

import ml_collections

from rspo_jax.config import keys, names, schema


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults of every key."""
  return ml_collections.ConfigDict(keys.plain(schema.Config()))


# Switches that say what is trained: they set the stage for all others.
FIRST = ("llada_8b", "dream_7b", "full")


def apply(config, arg: str, switches) -> ml_collections.ConfigDict:
  """Applies `:a,b` arguments of a config file: models first, the rest in order.

  Args:
    config: the task's config.
    arg: the text behind the colon; may be empty.
    switches: function by name; each changes the config in place.

  Raises:
    ValueError: a switch that does not exist.
  """
  given = [part.strip() for part in arg.split(",") if part.strip()]
  for name in given:
    if name not in switches:
      raise ValueError(
        f"config argument {name!r} is not known; "
        f"{names.did_you_mean(name, switches)}choose from "
        f"{', '.join(switches)}."
      )
  # Two models: the later one, as ever.
  for name in sorted(given, key=lambda n: (n not in FIRST, n == "full")):
    switches[name](config)
  return config
