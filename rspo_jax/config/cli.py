"""Command lines of the launch scripts: help, and mistakes as one message."""

import argparse
import difflib
import re
from collections.abc import Sequence


class Parser(argparse.ArgumentParser):
  """Raises where argparse would end the process; takes no abbreviations."""

  def __init__(self):
    super().__init__(add_help=False, allow_abbrev=False)

  def error(self, message):
    """Raises what argparse would print."""
    raise ValueError(f"{message}; see --help.")

  def read(
    self, argv: Sequence[str], others: str = r"(?!)"
  ) -> tuple[argparse.Namespace, list[str]]:
    """(options, other words) of a command line.

    Args:
      argv: words without the program's name.
      others: pattern of words that are not options and yet allowed.

    Raises:
      ValueError: a word that is neither; the nearest option is named.
    """
    options, extra = self.parse_known_args(list(argv))
    known = [f"--{name}" for name in vars(options)]
    for word in extra:
      if not re.match(others, word):
        near = difflib.get_close_matches(word.split("=")[0], known, 1)
        hint = f" did you mean {near[0]}?" if near else " see --help."
        raise ValueError(f"{word!r} is not an option:{hint}")
    return options, extra


def wants_help(argv: Sequence[str], text: str) -> bool:
  """Prints the help where a command line asks for it, and says so."""
  if any(word in ("--help", "-h", "-help") for word in argv):
    print(text)
    return True
  return False
