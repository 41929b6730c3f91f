"""Entry point of `python -m training.compare`: puts evaluations side by side."""

import sys

from training.eval.compare import main

if __name__ == "__main__":
    sys.exit(main())
