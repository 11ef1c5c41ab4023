"""`python -m rspo_jax.demo`."""

import sys

from rspo_jax.tools.demo.demo import main

sys.exit(main())
