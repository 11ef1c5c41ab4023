"""What a key of the config is: a field of a dataclass that carries its rules.

`key` makes one; `config/schema.py` is the whole list. From the fields follow
the nested dicts of a config and the way back, its checks, and the nearest name
for one that is not known.
"""

import dataclasses
import importlib
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rspo_jax.config import names


def key(
  default: Any,
  meaning: str,
  *,
  choices: Iterable[str] = (),
  table: str = "",
  at_least: float | None = None,
  above: float | None = None,
  at_most: float | None = None,
  below: float | None = None,
  free: bool = False,
) -> Any:
  """A field that is a key of the config.

  Args:
    default: its value, of the type that it always has (mappings and all
      other values are never null).
    meaning: for docs/configs.md.
    choices: allowed names.
    table: "module:NAME" of the dict, below rspo_jax, whose keys are allowed;
      looked up when it is needed, since most of them need JAX.
    at_least, above, at_most, below: the range of a number.
    free: may differ between the parts of one run: it says where or how loudly
      something is done, not what is computed.
  """
  rules = {
    "meaning": meaning,
    "choices": tuple(choices),
    "table": table,
    "at_least": at_least,
    "above": above,
    "at_most": at_most,
    "below": below,
    "free": free,
  }
  if isinstance(default, Mapping):
    frozen = types.MappingProxyType(dict(default))
    return dataclasses.field(default_factory=lambda: frozen, metadata=rules)
  return dataclasses.field(default=default, metadata=rules)


def walk(group: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
  """(dotted name, field, value) of every key of a group, in order.

  Args:
    group: `schema.Config` or a part of one.
    prefix: of the names.
  """
  for field in dataclasses.fields(group):
    value = getattr(group, field.name)
    if dataclasses.is_dataclass(value):
      yield from walk(value, f"{prefix}{field.name}.")
    elif "meaning" in field.metadata:
      yield f"{prefix}{field.name}", field, value


def plain(group: Any) -> dict[str, Any]:
  """Nested dicts of a group's values."""
  out = {}
  for field in dataclasses.fields(group):
    value = getattr(group, field.name)
    if dataclasses.is_dataclass(value):
      value = plain(value)
    out[field.name] = dict(value) if isinstance(value, Mapping) else value
  return out


def typed(values: Mapping[str, Any], kind: type) -> Any:
  """A group's dataclass of nested dicts that have exactly its keys."""
  defaults = kind()
  made = {}
  for field in dataclasses.fields(kind):
    value, default = values[field.name], getattr(defaults, field.name)
    if dataclasses.is_dataclass(default):
      value = typed(value, type(default))
    made[field.name] = value
  return kind(**made)


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
  """Refuses a name that is not allowed; offers the nearest.

  Raises:
    ValueError: names key, value and what there is.
  """
  allowed = sorted(allowed)
  if value not in allowed:
    near = names.did_you_mean(value, allowed)
    raise ValueError(
      f"{name}={value!r} is not known; {near}choose from {', '.join(allowed)}."
    )


def check_values(group: Any, prefix: str = "") -> None:
  """Checks each key's value by itself, without JAX.

  Args:
    group: `schema.Config`, or a part of one.
    prefix: of the names.

  Raises:
    ValueError: names key, value and remedy.
  """
  for name, field, value in walk(group, prefix):
    values = value.values() if isinstance(value, Mapping) else (value,)
    for one in values:
      _check_number(name, one)
    if isinstance(value, bool):
      continue
    if isinstance(value, int | float):
      _check_range(name, value, field.metadata)
    if field.metadata["choices"]:
      one_of(name, value, field.metadata["choices"])


def check_names(group: Any, prefix: str = "") -> None:
  """Checks the keys whose values are names in a table of the program.

  Raises:
    ValueError: names key, value and what there is.
  """
  for name, field, value in walk(group, prefix):
    # Only a key that is empty by default may name nothing.
    if field.metadata["table"] and (value or field.default):
      module, _, table = field.metadata["table"].partition(":")
      module = importlib.import_module(f"rspo_jax.{module}")
      one_of(name, value, getattr(module, table))


def check(group: Any, prefix: str) -> None:
  """Checks a group's values and names: see `check_values`, `check_names`."""
  check_values(group, prefix)
  check_names(group, prefix)


def _check_number(name: str, value: Any) -> None:
  """Numbers are finite and fit the arrays that they end in."""
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f"{name}={value} must be a finite number.")
  bound = 2**32 if name.endswith(".seed") else 2**31
  if type(value) is int and not -bound < value < bound:
    raise ValueError(f"{name}={value} is too large; use at most {bound - 1}.")


def _check_range(name: str, value: float, rules: Mapping[str, Any]) -> None:
  """The range of a key."""
  low, high = rules["at_least"], rules["at_most"]
  open_high = rules["below"]
  if high is not None or open_high is not None:
    top = high if high is not None else open_high
    inside = low <= value < top or (high is not None and value == high)
    if not inside:
      raise ValueError(
        f"{name}={value} must lie in [{low:g}, {top:g}"
        f"{')' if high is None else ']'}."
      )
  elif low is not None and value < low:
    what = "not be negative" if low == 0 else f"be at least {low}"
    raise ValueError(f"{name}={value} must {what}.")
  if rules["above"] is not None and value <= rules["above"]:
    raise ValueError(f"{name}={value} must be greater than {rules['above']}.")
