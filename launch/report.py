"""Makes one HTML page from the folders of runs.

python launch/report.py runs/ablation --out=report.html
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from rspo_jax.tools.report import report

if __name__ == "__main__":
  sys.exit(report.main())
