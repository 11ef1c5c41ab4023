"""What the `sweep()` of a config file lists, read and checked."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from rspo_jax.config import load, names


@dataclasses.dataclass(frozen=True)
class Entry:
  """One configuration and its seeds.

  Attributes:
    name: names the folders; letters, digits and . _ = -
    overrides: value by config key, such as {"objective.lambda_": 0.0}.
    seeds: values of run.seed, one run each.
    arg: arguments of the config file, added to those of --config.
  """

  name: str = ""
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seeds: Sequence[int] = (0,)
  arg: str = ""


def load_entries(config: str) -> list[Entry]:
  """Reads and checks the `sweep()` of a config file.

  Args:
    config: path of the file, with or without `:ARG`.

  Raises:
    ValueError: no such file, no `sweep()`, or an entry that cannot be.
  """

  def listed(module):
    if not hasattr(module, "sweep"):
      raise ValueError(
        "the file has no sweep(); add one that returns a list of "
        '{"name": ..., "overrides": {...}, "seeds": [...]}.'
      )
    return list(module.sweep())

  path = config.partition(":")[0]
  entries = [_entry(item, path) for item in load.from_file(config, listed)]
  if not entries:
    raise ValueError(f"sweep() of {path} is empty; list at least one entry.")
  counts = collections.Counter(entry.name for entry in entries)
  name, count = counts.most_common(1)[0]
  if count > 1:
    raise ValueError(
      f"sweep() of {path} has {count} entries named {name!r}; each needs a "
      "name of its own."
    )
  return entries


def _entry(item: Any, path: str) -> Entry:
  """Checks one item of `sweep()`."""
  if not isinstance(item, Mapping):
    raise ValueError(
      f"sweep() of {path} gave {item!r}; entries are dicts with name, "
      "overrides and seeds."
    )
  allowed = [field.name for field in dataclasses.fields(Entry)]
  for key in item:
    if key not in allowed:
      raise ValueError(
        f"an entry of sweep() in {path} has the key {key!r}; "
        f"{names.did_you_mean(key, allowed)}allowed are {', '.join(allowed)}."
      )
  entry = Entry(**item)

  def refuse(text: str) -> NoReturn:
    raise ValueError(f"entry {entry.name!r} of {path} {text}")

  # A name becomes a folder, a job name and a file name.
  if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=-]*", str(entry.name)):
    raise ValueError(
      f"sweep() of {path} has an entry named {entry.name!r}; use letters, "
      "digits and . _ = -"
    )
  if not isinstance(entry.overrides, Mapping):
    refuse(
      f"has overrides={entry.overrides!r}; give a dict such as "
      '{"objective.lambda_": 0.0}.'
    )
  if "run.seed" in entry.overrides:
    refuse("overrides run.seed; use seeds=[...].")
  if not isinstance(entry.seeds, Iterable):
    refuse(
      f"has seeds={entry.seeds!r}; give a list, such as [{entry.seeds!r}]."
    )
  seeds = tuple(entry.seeds)
  good = all(type(seed) is int and seed >= 0 for seed in seeds)
  if not seeds or not good or len(set(seeds)) < len(seeds):
    refuse(f"has seeds={list(seeds)!r}; give different integers >= 0.")
  return dataclasses.replace(entry, seeds=seeds)
