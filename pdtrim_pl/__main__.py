"""`python -m pdtrim_pl` is the command `pdtrim`."""

import sys

from pdtrim_pl.cli.main import main

sys.exit(main())
