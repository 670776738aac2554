"""`python -m papo`."""

import sys

from papo.cli import main

if __name__ == "__main__":
    sys.exit(main())
