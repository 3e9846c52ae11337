"""`python -m ais_jax` is the command `ais-jax`."""

import sys

from ais_jax.cli import main

sys.exit(main())
