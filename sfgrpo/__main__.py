"""Entry point of `python -m sfgrpo`."""

import sys

from sfgrpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
