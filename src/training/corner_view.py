"""Entry point of `python -m training.corner_view`: shows the attention and the features of corner tokens."""

import sys

from training.eval.corner_view import main

if __name__ == "__main__":
    sys.exit(main())
