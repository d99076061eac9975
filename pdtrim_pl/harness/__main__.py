"""`python -m pdtrim_pl.harness ...`: the command `lm_eval`, which then knows the model `pdtrim`."""

import sys

from pdtrim_pl.errors import UserError
from pdtrim_pl.harness.tasks import needs_harness

if __name__ == "__main__":
    try:
        with needs_harness():
            from lm_eval.__main__ import cli_evaluate

            import pdtrim_pl.harness.model  # noqa: F401
        cli_evaluate()
    except UserError as error:
        sys.exit(f"pdtrim: error: {error}")
