"""`python -m rspo_jax.report`."""

import sys

from rspo_jax.tools.report.report import main

sys.exit(main())
