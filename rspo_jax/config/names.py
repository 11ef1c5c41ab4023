"""Names that nobody knows: which of the known ones may have been meant."""

import difflib
from collections.abc import Callable, Iterable


def nearest(
  name: str, known: Iterable[str], at_least: float = 0.6
) -> list[str]:
  """Up to three known names that are like another one, the likeliest first.

  Args:
    name: what was given.
    known: what there is.
    at_least: likeness, in [0, 1].
  """
  name, known = str(name), list(known)
  last = name.lstrip("-").rpartition(".")[2]
  # Else a key without its group, or in the wrong one.
  return difflib.get_close_matches(name, known, 3, at_least) or [
    k for k in known if k.rpartition(".")[2] == last
  ]


def did_you_mean(
  name: str, known: Iterable[str], quote: Callable[[str], str] = repr
) -> str:
  """ "did you mean 'x'? ", or "" where no known name is like it.

  Keys of the same name in other groups are all named.
  """
  near = nearest(name, known)
  last = str(name).rpartition(".")[2]
  same = [k for k in near if k.endswith(f".{last}") and "/" not in k]
  likely = same if near[:1] == same[:1] else near[:1]
  words = " or ".join(map(quote, likely))
  return f"did you mean {words}? " if likely else ""
