"""`python -m rspo_jax.diagnose`."""

import sys

from rspo_jax.tools.diagnose.diagnose import main

sys.exit(main())
