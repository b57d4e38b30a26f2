"""`python -m mesocosm`: the command line."""

import sys

from mesocosm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
