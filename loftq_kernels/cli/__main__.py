"""``python -m loftq_kernels.cli`` is the same as ``loftq-kernels``."""

import sys

from loftq_kernels.cli.main import main

sys.exit(main())
