"""The command line of training.main: the parser, files of flags, and checks before any work.

Nothing here imports torch, so that --help and usage errors appear immediately.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from dataloaders.registry import benchmarks, find_below_data_root, set_further_benchmarks, suites
from training.data.captions import LONG_KEYS, RAW_KEYS
from training.data.order import SHUFFLE_SHARDS, SHUFFLE_WINDOW
from training.flags.checks import check_flags
from training.flags.config import config_words, format_config
from training.flags.effects import describe_idle, idle_flags
from training.flags.model import AUTO, PRECISIONS
from training.flags.table import NO_EFFECT, Parser, add_declared_flags
from training.flags.types import HelpFormatter
from training.readers.captions import CAPTION_LISTS
from training.readers.samples import INDEX_CACHE
from training.runtime.experiment import Experiment, load_experiment
from training.runtime.gpus import GPUS

PROG = "python -m training.main"
DESCRIPTION = """\
Train on short and long captions, or evaluate long text-image retrieval for any open_clip, LoTLIP or Long-CLIP model.

  python -m training.main --config lotlip-cc3m --train-data 'DATA/{00000..00575}.tar'
  python -m training.main --urban1k-retrieval DATA/Urban1k --model ViT-B-16 --pretrained openai
  torchrun --nproc_per_node 8 -m -- training.main --dci-retrieval DATA/dci --iiw-retrieval DATA/iiw ...
"""
EPILOG = """\
Flags may be written with - or _ between words. --no-x turns off a switch --x that a --config file turned on.
Exit codes: 0 success, 1 the data can't be used or the model diverged, 2 usage error, 70 another process has ended or
does not respond, 75 stopped by a signal after saving (70, 75: continue with --resume latest), 130 Ctrl-C.
"""


def _print_help(parser: Parser, *_: object) -> None:
    build_parser(everything=False).print_help()
    parser.exit()


def _print_all_help(parser: Parser, *_: object) -> None:
    parser.print_help()
    parser.exit()


def _model_config(_: object, namespace: argparse.Namespace, file: str, *__: object) -> None:
    namespace.model = f"config:{file}"


def _caption_key(_: object, namespace: argparse.Namespace, column: str, *__: object) -> None:
    namespace.raw_caption_keys, namespace.captions = (column,), "raw"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; the result must not be changed afterwards.

    Rank 0 prints a warning for each group of flags without an effect.

    Args:
        argv: words after the program's name; `sys.argv[1:]` if None. Flags are accepted with `-` or `_` between words.

    Raises:
        SystemExit: with code 2 and a one-line message for a usage error, 0 after --help and --print-config.
    """
    # The flags that decide which others there are.
    parser = early = Parser(prog=PROG, add_help=False, allow_abbrev=False)
    early.add_argument("--config", nargs="+", action="extend", default=[])
    early.add_argument("--experiment")
    words = [_with_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        files, _ = early.parse_known_args(words)
        first, _ = early.parse_known_args([*config_words(files.config, early.actions), *words])
        experiment = load_experiment(first.experiment) if first.experiment else Experiment
        set_further_benchmarks(experiment.benchmarks)
        parser = build_parser()
        experiment.add_flags(parser.add_argument_group(f"experiment {first.experiment}"))
        args = parser.parse_args([*config_words(files.config, parser.actions, parser.parse_args), *words])
        if args.print_config:
            print(format_config(args, parser.actions), end="")
            parser.exit()
        if args.dataset_type == "synthetic" and not args.train_data:  # as in open_clip's commands
            args.train_data = args.dataset_type
        absent = find_below_data_root(args)
        known = vars(args).pop(NO_EFFECT, [])
        check_flags(args)
        idle = idle_flags(args, vars(parser.parse_args([])), parser.effects)
        for condition, flags in idle.items():
            if condition.refused:
                raise ValueError(describe_idle(condition, flags))
        for line in [*([absent] if absent else []), *known, *(describe_idle(*item) for item in idle.items())]:
            if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
                print(f"{parser.prog}: warning: {line}", file=sys.stderr)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return args


def _with_hyphens(word: str) -> str:
    """``--share4v_val_num=1,2`` -> ``--share4v-val-num=1,2``, because both spellings occur in published commands."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def build_parser(everything: bool = True) -> Parser:
    """Returns the parser.

    Args:
        everything: False leaves out rarely needed flags, for a short --help.
    """
    parser = Parser(
        prog=PROG,
        usage="%(prog)s [--FLAG VALUE ...]",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
        epilog=EPILOG,
    )
    values = {
        "AUTO": AUTO,
        "CAPTION_KEY": _caption_key,
        "CAPTION_LISTS": CAPTION_LISTS,
        "GPUS": tuple(GPUS),
        "HELP": _print_help,
        "HELP_ALL": _print_all_help,
        "INDEX_CACHE": INDEX_CACHE,
        "LONG_KEYS": ",".join(LONG_KEYS),
        "MODEL_CONFIG": _model_config,
        "PRECISIONS": (AUTO, *PRECISIONS),
        "PROTOCOLS": "; ".join(", ".join(b.protocols) for b in benchmarks() if len(b.protocols) > 1),
        "RAW_KEYS": ",".join(RAW_KEYS),
        "SHUFFLE_SHARDS": SHUFFLE_SHARDS,
        "SHUFFLE_WINDOW": SHUFFLE_WINDOW,
        "SUITES": suites(),
    }
    add_declared_flags(parser, values, everything)
    return parser
