"""`python -m raco_fast` is the command `raco-fast`."""

import sys

from raco_fast.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
