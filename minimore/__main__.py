"""`python -m minimore` is `minimore`."""

import sys

from .cli import main

sys.exit(main())
