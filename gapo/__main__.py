"""`python -m gapo`, the same as the command `gapo`."""

import sys

from gapo.cli import main

if __name__ == "__main__":
    sys.exit(main())
