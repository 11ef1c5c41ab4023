"""`python -m rspo_jax.scores DIR [DIR ...]`: one table over evaluations."""

import sys
from collections.abc import Sequence

from rspo_jax.config import cli
from rspo_jax.reporting import tables

PARSER = cli.Parser(
  "python -m rspo_jax.scores DIR [DIR ...]",
  [cli.Option("DIR", "folder of a run or of evaluations (their *.json)")],
  "exit status: 0 done, 2 mistake in the command.",
)


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the table of the folders named; returns the exit status."""
  argv = sys.argv[1:] if argv is None else argv
  if PARSER.wants_help(argv):
    return cli.DONE
  try:
    folders = PARSER.read(argv).words
    if not folders:
      raise ValueError(
        "no folder is given; try python -m rspo_jax.scores runs."
      )
    print(tables.markdown(tables.table(tables.read(folders))))
  except ValueError as error:
    return cli.mistake(error)
  return cli.DONE


if __name__ == "__main__":
  sys.exit(main())
