"""Command lines: an option is said once, and a mistake is one message.

    PARSER = Parser(
      "python -m rspo_jax.demo [options]",
      [Option("--seed=N", "of the draws", 0, int, least=0)],
      "exit status: 0 done, 2 mistake in the command.",
    )
    if PARSER.wants_help(argv):
      return 0
    options = PARSER.read(argv)

An option's value may be its own word (`--seed 3`); one dash is as good as two;
the last of several counts.
"""

import argparse
import dataclasses
import math
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from rspo_jax.config import names, schema

DONE, MISTAKE = 0, 2
# The form of the option that stands for every key of the config, and that of
# words which are no options.
OVERRIDE = "--config.GROUP.KEY=VALUE"
_HELP = ("--help", "-h", "-help", "--helpfull")
_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Option:
  """What may stand on a command line.

  Attributes:
    form: "--out=DIR"; without "=", a switch; without dashes, any number of
      words; or `OVERRIDE`.
    meaning: for the help.
    default: value where the command says nothing.
    kind: str, int or float.
    choices: allowed names.
    least, most: range of a number, both inclusive.
    example: of an option that must be given.
  """

  form: str
  meaning: str
  default: Any = ""
  kind: type = str
  choices: Sequence[str] = ()
  least: float = -math.inf
  most: float = math.inf
  example: str = ""

  @property
  def flag(self) -> str:
    """ "--out" of "--out=DIR"."""
    return self.form.partition("=")[0]

  def value(self, text: str | None) -> Any:
    """The value that a text means, or the default without one.

    Raises:
      ValueError: names the option, the text and what it must be.
    """
    if not text and self.example:
      raise ValueError(
        f"{self.flag} is missing; try {self.flag}={self.example}."
      )
    if text is None or text == self.default:
      return self.default
    if not text and self.default:
      raise ValueError(f"{self.flag} needs a value; write {self.form}.")
    if self.choices:
      schema.one_of(self.flag, text, self.choices)
    if self.kind is str:
      return text
    try:
      value = self.kind(text)
    except ValueError:
      value = math.nan
    if not self.least <= value <= self.most:
      what = "a whole number" if self.kind is int else "a number"
      if self.most < math.inf:
        what += f" in {self.least} .. {self.most}"
      elif self.least > -math.inf:
        what += f" from {self.least} on"
      raise ValueError(f"{self.flag}={text} must be {what}.")
    return value


class _Words(argparse.ArgumentParser):
  """Splits a command line; raises where argparse would end the process."""

  def error(self, message):
    flag = message.removeprefix("argument ").partition(":")[0]
    if "expected one argument" in message:
      raise ValueError(f"{flag} needs a value; write {flag}=VALUE.")
    raise ValueError(f"{message}; see --help.")


class Parser:
  """The command line of one command."""

  def __init__(self, usage: str, options: Sequence[Option], end: str):
    """Keeps what the help and the reading of a command line need.

    Args:
      usage: the first line of the help.
      options: in the order of the help.
      end: the last paragraph of the help.
    """
    self.usage, self.options, self.end = usage, options, end
    self._named = [
      option
      for option in options
      if option.form.startswith("--") and option.form != OVERRIDE
    ]
    forms = {option.form for option in options}
    self._overrides = OVERRIDE in forms
    self._takes_words = len(forms - {OVERRIDE}) > len(self._named)

  def wants_help(self, argv: Sequence[str]) -> bool:
    """Prints the help where a command line asks for it, and says so."""
    if any(word in _HELP for word in argv):
      print(self.help())
      return True
    return False

  def help(self) -> str:
    """Usage, the options with their meanings, and the end."""
    width = 4 + min(30, max(len(option.form) for option in self.options))
    lines = [f"usage: {self.usage}", ""]
    for option in self.options:
      head = f"  {option.form}".ljust(width)
      if len(head) > width:
        lines.append(head)
        head = " " * width
      lines += textwrap.wrap(
        option.meaning,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * width,
      )
    return "\n".join([*lines, "", *textwrap.wrap(self.end, _WIDTH)])

  def read(self, argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line, without the program's name.

    Returns:
      The value of each option by its name; `words`, those that are no options;
      `overrides`, text by key of the config.

    Raises:
      ValueError: one message with value and remedy.
    """
    rest, overrides = list(argv), {}
    if self._overrides:
      rest, overrides = _take_overrides(argv)
    parser = _Words(add_help=False, allow_abbrev=False)
    for option in self._named:
      switch = "=" not in option.form
      parser.add_argument(
        option.flag, action="store_true" if switch else "store"
      )
    options, extra = parser.parse_known_args(
      [re.sub(r"^-(?=[a-z]\w)", "--", word) for word in rest]
    )
    for word in extra:
      if word.startswith("-"):
        raise ValueError(f"{word} is not an option; {self._hint(word)}")
      if not self._takes_words:
        raise ValueError(f"{word!r} is not an option; options start with --.")
    for option in self._named:
      name = option.flag.removeprefix("--")
      found = getattr(options, name)
      if not isinstance(found, bool):
        setattr(options, name, option.value(found))
    options.words, options.overrides = extra, overrides
    return options

  def _hint(self, word: str) -> str:
    """What may have been meant by a word that is not an option."""
    known = [option.flag for option in self._named]
    if self._overrides:
      known += [f"--config.{name}" for name, _, _ in schema.walk()]
    return (
      f"{names.did_you_mean(word.partition('=')[0], known, str)}see --help."
    )


def _take_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """(other words, text by key of the config) of a command line."""
  rest, overrides, words = [], {}, iter(argv)
  for word in words:
    if not (found := re.match(r"--?config\.([^=]*)(=?)", word)):
      rest.append(word)
      continue
    key, equals = found.groups()
    value = word[found.end() :] if equals else next(words, "--")
    if not equals and value.startswith("--"):
      raise ValueError(
        f"--config.{key} needs a value; write --config.{key}=VALUE."
      )
    overrides[key] = value
  return rest, overrides


def mistake(error: Exception | str) -> int:
  """Prints what is wrong with a command; returns the exit status."""
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  return MISTAKE
