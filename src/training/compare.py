"""Entry point of `python -m training.compare`: compares evaluations."""

import sys

from training.eval.compare import main

if __name__ == "__main__":
    sys.exit(main())
