"""Command lines: an option is said once, and a mistake is one message.

    PARSER = Parser(
      "python -m rspo_jax.demo [options]",
      [Option("--seed=N", "of the draws", 0, int, 0)],
      "exit status: 0 done, 2 mistake in the command.",
    )
    def main(argv=None):
      return PARSER.run(act, argv)  # act: options -> exit status

An option's value may be a word of its own (`--seed 3`), one dash is as good as
two, and the last of several counts.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from rspo_jax.config import keys, names, schema

DONE, MISTAKE, INTERRUPTED = 0, 2, 130
# The form of the option that stands for every key of the config.
OVERRIDE = "--config.GROUP.KEY=VALUE"
_HELP = ("--help", "-h", "-help", "--helpfull")
_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Option:
  """What may stand on a command line.

  Attributes:
    form: "--out=DIR"; without "=", a switch; without dashes, any number of
      words that are no options; or `OVERRIDE`.
    meaning: for the help, which adds choices and default.
    default: value where the command says nothing.
    kind: str, int or float.
    least, most: range of a number.
    choices: allowed names.
    example: of an option that must be given.
  """

  form: str
  meaning: str
  default: Any = ""
  kind: type = str
  least: float = -math.inf
  most: float = math.inf
  choices: Sequence[str] = ()
  example: str = ""

  @property
  def flag(self) -> str:
    """ "--out" of "--out=DIR"."""
    return self.form.partition("=")[0]

  def help(self, width: int) -> list[str]:
    """Lines of the help; meanings begin behind `width` characters."""
    text = " | ".join(self.choices)
    text = f"{text}: {self.meaning}" if text else self.meaning
    if self.default not in ("", None):
      text += f" (default: {self.default})"
    head = f"  {self.form}".ljust(width)
    above = [] if len(head) == width else [head]
    head = " " * width if above else head
    return above + textwrap.wrap(
      text, _WIDTH, initial_indent=head, subsequent_indent=" " * width
    )

  def value(self, text: str | None) -> Any:
    """The value that a text means; the default where nothing is given.

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
      keys.one_of(self.flag, text, self.choices)
    if self.kind is str:
      return text
    try:
      value = self.kind(text)
    except ValueError:
      value = math.nan
    if self.least <= value <= self.most:
      return value
    what = "a whole number" if self.kind is int else "a number"
    if self.most < math.inf:
      what += f" in {self.least} .. {self.most}"
    elif self.least > -math.inf:
      what += f" from {self.least} on"
    raise ValueError(f"{self.flag}={text} must be {what}.")


@dataclasses.dataclass(frozen=True)
class Parser:
  """The command line of one command.

  Attributes:
    usage: first line of the help.
    options: in the order of the help.
    end: last words of the help.
    check: raises a ValueError where options do not go together.
  """

  usage: str
  options: Sequence[Option]
  end: str
  check: Callable[[argparse.Namespace], None] = lambda options: None

  def wants_help(self, argv: Sequence[str]) -> bool:
    """Prints the help where a command line asks for it, and says so."""
    if not any(word in _HELP for word in argv):
      return False
    width = 4 + min(28, max(len(option.form) for option in self.options))
    lines = [f"usage: {self.usage}", ""]
    for option in self.options:
      lines += option.help(width)
    with _reader_may_go():
      print("\n".join([*lines, "", *textwrap.wrap(self.end, _WIDTH)]))
    return True

  def read(self, argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line, without the program's name.

    Returns:
      The value of each option by its name; `words`, those that are no options;
      `overrides`, text by key of the config.

    Raises:
      ValueError: one message with value and remedy.
    """
    takes_overrides = any(o.form == OVERRIDE for o in self.options)
    rest, overrides = _overrides(argv) if takes_overrides else (argv, {})
    places = [o for o in self.options if o.form[0] != "-"]
    named = [o for o in self.options if o.form[0] == "-" and o.form != OVERRIDE]
    options, words = _split(named, rest)
    for word in words:
      if word.startswith("-"):
        known = [option.flag for option in named]
        if takes_overrides:
          known += [
            f"--config.{name}" for name, _, _ in keys.walk(schema.Config())
          ]
        near = names.did_you_mean(word.partition("=")[0], known, str)
        raise ValueError(f"{word} is not an option; {near}see --help.")
      if not places:
        raise ValueError(f"{word!r} is not an option; options start with --.")
    for place in places:
      if place.example and not words:
        raise ValueError(f"{place.form} is missing; try {place.example}.")
    for option in named:
      if "=" in option.form:
        name = option.flag.removeprefix("--")
        setattr(options, name, option.value(getattr(options, name)))
    options.words, options.overrides = words, overrides
    self.check(options)
    return options

  def run(
    self,
    act: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
  ) -> int:
    """Runs a command; returns its exit status.

    Args:
      act: takes the options, returns the exit status; what it raises of
        ValueError and OSError is a mistake in the command.
      argv: words without the program's name; those of the process by default.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
      with _reader_may_go():
        return DONE if self.wants_help(argv) else act(self.read(argv))
      return DONE
    except (ValueError, OSError) as error:
      return mistake(error)
    except KeyboardInterrupt:
      print()
      return INTERRUPTED


@contextlib.contextmanager
def _reader_may_go():
  """Prints to a reader who may have gone, as `head` does: no fault."""
  try:
    yield
    sys.stdout.flush()
  except BrokenPipeError:
    # Nor is anything said when the process ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _split(
  named: Sequence[Option], words: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
  """(texts of the options, other words) of a command line."""
  parser = argparse.ArgumentParser(
    add_help=False, allow_abbrev=False, exit_on_error=False
  )
  for option in named:
    action = "store" if "=" in option.form else "store_true"
    parser.add_argument(option.flag, action=action)
  try:
    return parser.parse_known_args(
      [re.sub(r"^-(?=[a-z]\w)", "--", word) for word in words]
    )
  except argparse.ArgumentError as error:
    flag = error.argument_name
    form = next(option.form for option in named if option.flag == flag)
    what = "needs a value" if "=" in form else "takes no value"
    raise ValueError(f"{flag} {what}; write {form}.") from None


def _overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """(other words, text by key of the config) of a command line."""
  rest, overrides, words = [], {}, iter(argv)
  for word in words:
    if not (found := re.match(r"--?config\.([^=]*)(=?)", word)):
      rest.append(word)
      continue
    key, equals = found.groups()
    value = word[found.end() :] if equals else next(words, "--")
    if not equals and value.startswith("--"):
      flag = f"--config.{key}"
      raise ValueError(f"{flag} needs a value; write {flag}=VALUE.")
    overrides[key] = value
  return rest, overrides


def mistake(error: Exception | str) -> int:
  """Prints what is wrong with a command; returns the exit status."""
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  return MISTAKE
