"""Says whether a run fits a TPU slice, and how long a step is, without one.

python launch/plan.py --config=configs/countdown.py:llada_8b --topology=v5e:2x2
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from rspo_jax.planning import command

if __name__ == "__main__":
  sys.exit(command.main())
