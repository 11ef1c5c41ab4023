"""`python -m rspo_jax.scores DIR [DIR ...]`: one table over evaluations."""

import sys

from rspo_jax.reporting.tables import main

if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
