"""`python -m rspo_jax.scores DIR [DIR ...]`: one table over evaluations.

It shows every evaluation (`--mode=eval`) in the folders, as Markdown.
"""

import sys
from collections.abc import Sequence

from rspo_jax.reporting import tables


def main(arguments: Sequence[str]) -> int:
  """Prints the table of the folders named; returns the exit status."""
  if not arguments or arguments[0].startswith("-"):
    print(
      "usage: python -m rspo_jax.scores DIR [DIR ...]", file=sys.stderr
    )
    return 2 if not arguments else 0
  try:
    print(tables.markdown(tables.table(tables.read(arguments))))
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
