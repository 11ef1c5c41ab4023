"""Runs or prints every run of a config's sweep().

python launch/sweep.py --config=configs/countdown.py --out=runs/ablation
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from rspo_jax.tools.sweep import sweep

if __name__ == "__main__":
  sys.exit(sweep.main())
