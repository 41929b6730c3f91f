"""The entry point: `python -m training.prepare --help`."""

import importlib
import logging
import sys
from collections.abc import Sequence

from training.prepare.params import build_parser
from training.runtime.lease import Lease
from training.runtime.processes import ends_if_stuck


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        Exit code: 0: done; 1: failed on some data; 2: usage error; 130: Ctrl-C.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    name = f"python -m training.prepare {args.command}"
    try:
        with (
            ends_if_stuck(name, args.timeout_minutes),
            Lease() as args.lease,
        ):  # commands take it once flags are checked
            return importlib.import_module(f"training.prepare.{args.module}").run(args)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog} {args.command}: error: {error}\n")
    except OSError as error:  # a full disk, a lost mount
        print(f"{parser.prog} {args.command}: {error}; the same command continues from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
