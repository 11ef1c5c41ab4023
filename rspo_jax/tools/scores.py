"""`python -m rspo_jax.scores DIR [DIR ...]`: one table over evaluations.

It shows every evaluation (`--mode=eval`) in the folders, as Markdown.
"""

import sys
from collections.abc import Sequence

from rspo_jax.config import cli
from rspo_jax.reporting import tables

PARSER = cli.Parser(
  "python -m rspo_jax.scores DIR [DIR ...]",
  [cli.Option("DIR", "folder of a run or of its eval/", example="runs/mine")],
  "exit status: 0 done, 2 mistake in the command.",
)


def _print(options) -> int:
  """Prints the table of the folders named."""
  print(tables.markdown(tables.table(tables.read(options.words))))
  return cli.DONE


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  return PARSER.run(_print, argv)


if __name__ == "__main__":
  sys.exit(main())
