"""`python -m pdtrim_pl` is the command `pdtrim`."""

import sys

from pdtrim_pl.cli import main

sys.exit(main())
