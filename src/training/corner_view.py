"""Entry point of `python -m training.corner_view`: shows what corner tokens look at."""

import sys

from training.eval.corner_view import main

if __name__ == "__main__":
    sys.exit(main())
