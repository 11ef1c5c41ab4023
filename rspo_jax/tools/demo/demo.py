"""Watch a model fill in a completion, in the terminal or in a small web page.

    python -m rspo_jax.demo
    python -m rspo_jax.demo --model=runs/mine/model --prompt="3,5,7=56"
    python -m rspo_jax.demo --web

What is answered, and how, is in session.py; `--web` (web.py) serves the same on
the loopback interface alone.
"""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from rspo_jax.config import cli
from rspo_jax.config.cli import Option
from rspo_jax.run import rules
from rspo_jax.tools.demo.session import TASKS, Session

_HIDDEN = "\u25af"
# Those that are of the sampler.
_WISHES = ("length", "block", "steps", "temperature", "cache", "threshold")

PARSER = cli.Parser(
  "python -m rspo_jax.demo [options]",
  [
    Option(
      "--model=PATH",
      "checkpoint folder, or embedded:countdown or embedded:sudoku",
      "embedded:countdown",
    ),
    Option("--prompt=TEXT", "answered; else prompts are read one by one", None),
    Option(
      "--task=NAME",
      "whose prompts are understood and judged; the model's own without it",
      choices=("none", *TASKS),
    ),
    Option("--length=L", "tokens of a completion", None, int),
    Option("--block=N", "tokens of a block", None, int),
    Option("--steps=T", "forwards of all blocks", None, int),
    Option("--temperature=X", "of the tokens; 0 is greedy", 0.0, float),
    Option("--cache=NAME", "none | prefix | dual", "none"),
    Option("--threshold=P", "commits what is at least this sure", None, float),
    Option("--seed=N", "of the draws", 0, int, 0, 2**31 - 1),
    Option("--pause=S", "seconds between two forwards", 0.15, float, 0, 60),
    Option(
      "--dtype=NAME",
      "of the parameters; float32 for small models without it",
      choices=("float32", "bfloat16"),
    ),
    Option("--web", "serve a page on this machine instead"),
    Option("--port=N", "of the page; 0: any free one", 8000, int, 0, 65535),
  ],
  "exit status: 0 done, 2 mistake in the command.",
)


def _line(pieces: Sequence[str | None]) -> str:
  """A canvas as text, a box where nothing is written yet."""
  return "".join(_HIDDEN if piece is None else piece for piece in pieces)


class Screen:
  """Shows a completion as it comes, on a terminal or as plain lines."""

  def __init__(self, stream, pause_s: float):
    self._stream = stream
    self._pause_s = pause_s
    self._terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    self._live: Any = None
    self._before: list | None = None
    self._forward = 0

  def __enter__(self):
    if self._terminal:
      import rich.live

      self._live = rich.live.Live(refresh_per_second=20, transient=False)
      self._live.start()
    return self

  def __exit__(self, *_):
    if self._live is not None:
      self._live.stop()

  def tell(self, pieces: list) -> None:
    """Shows a canvas; new pieces stand out."""
    if self._live is not None:
      import rich.text

      before = self._before or [None] * len(pieces)
      text = rich.text.Text(f"{self._forward:>4}  ", style="dim")
      for old, piece in zip(before, pieces, strict=True):
        new = old is None and piece is not None
        style = "dim" if piece is None else "bold green" if new else "default"
        text.append(_HIDDEN if piece is None else piece, style=style)
      self._live.update(text)
    else:
      self._stream.write(f"{self._forward:>4}  {_line(pieces)}\n")
      self._stream.flush()
    self._before, self._forward = pieces, self._forward + 1
    if self._terminal and self._pause_s:
      time.sleep(self._pause_s)


def show(session: Session, text: str, settings, seed: int, pause_s: float):
  """Answers one prompt on standard output."""
  print(f"prompt {text.strip()}", flush=True)
  with Screen(sys.stdout, pause_s) as screen:
    answer = session.answer(text, settings, seed, screen.tell)
  print(f"answer {answer.text}")
  verdict = answer.verdict
  if verdict is not None:
    word = "right" if verdict["correct"] else "wrong"
    print(
      f"{word}: {verdict['reason']} (reward {verdict['reward']:.3g}, "
      f"{answer.forwards} forwards)"
    )
  else:
    print(f"{answer.forwards} forwards in {answer.seconds:.1f} s")


def converse(session: Session, settings, options) -> None:
  """Reads prompts one by one; an empty line takes one of the task's own.

  Without a person in front of it, shows three of the task's prompts.
  """
  if not sys.stdin.isatty():
    if not session.examples:
      raise ValueError(
        f"--prompt is missing, and --model={session.name} belongs to no task "
        "with prompts of its own; write --prompt=TEXT."
      )
    for place, text in enumerate(session.examples[:3]):
      show(session, text, settings, options.seed + place, options.pause)
    return
  count = 0
  offer = ", empty for one of the task's" if session.examples else ""
  print(f"A prompt{offer}; Ctrl-D ends.")
  while True:
    try:
      text = input("> ")
    except EOFError:
      print()
      return
    if not text.strip() and session.examples:
      text = session.examples[count % len(session.examples)]
    count += 1
    try:
      show(session, text, settings, options.seed + count, options.pause)
    except ValueError as error:
      print(f"error: {error}", file=sys.stderr)


def _answer(options) -> int:
  """Loads the model and does what the options ask for."""
  rules.resolve_model_path(options.model)
  print(f"demo: loading {options.model}", flush=True)
  session = Session(options.model, options.task, options.dtype)
  settings = session.check(**{key: getattr(options, key) for key in _WISHES})
  if options.web:
    from rspo_jax.tools.demo import web

    return web.serve(session, options.port)
  if options.prompt is not None:
    show(session, options.prompt, settings, options.seed, options.pause)
  else:
    converse(session, settings, options)
  return cli.DONE


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  return PARSER.run(_answer, argv)
