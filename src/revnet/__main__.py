"""`python -m revnet`: the command line."""

import sys

from revnet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
