"""From caption tables and images to training shards. See TRAIN_DATASETS.md.

  python -m training.prepare tables cc3m_3long_3short_1raw_captions_url.csv --out data/cc3m-tables
  python -m training.prepare download data/cc3m-tables --out data/cc3m
  python -m training.prepare inspect data/cc3m --out data/cc3m-report
  python -m training.prepare join data/cc3m-tables --shards data/own --out data/own-captioned
  python -m training.prepare recaption data/own --out data/own-captioned --caption long_caption=detailed --vlm FOLDER

If a command was killed, run it again: it continues, and does not repeat what is complete on disk.
"""

# This module imports nothing heavy, so that --help is fast.
import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from training.flags.types import HelpFormatter, add_groups
from training.readers.captions import CAPTION_LISTS
from training.runtime.lease import Lease
from training.runtime.processes import add_timeout_arg, ends_if_stuck

COMMANDS = yaml.safe_load(Path(__file__).with_name("commands.yaml").read_text(encoding="utf-8"))
_CPUS = os.cpu_count() or 1
_VALUES = {"CPUS": _CPUS, "WORKERS": min(64, _CPUS), "FEW_WORKERS": min(8, _CPUS), "CAPTION_LISTS": CAPTION_LISTS}


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser with its commands."""
    parser = argparse.ArgumentParser(
        prog="python -m training.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Exit codes: 0 done, 1 failed on some data, 2 usage error, 130 Ctrl-C.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, declared in COMMANDS.items():
        command = commands.add_parser(name, help=declared["about"], formatter_class=HelpFormatter, allow_abbrev=False)
        command.description = declared["about"]
        command.set_defaults(module=declared["module"])
        add_groups(command, {"flags": declared["flags"]}, _VALUES)
        add_timeout_arg(command, 120.0)  # a shard of downloads may take long
    return parser


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
        with ends_if_stuck(name, args.timeout_minutes), Lease() as args.lease:  # taken once flags are checked
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
