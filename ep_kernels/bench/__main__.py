"""`python -m ep_kernels.bench`."""

import sys

from ep_kernels.bench.cli import main

sys.exit(main())
