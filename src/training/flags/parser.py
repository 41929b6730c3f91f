"""The command line of training.main: the parser, files of flags, and checks before any work.

Nothing here imports torch, so that --help and usage errors appear immediately.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from dataloaders.registry import find_below_data_root, set_further_benchmarks
from training.flags import eval as evaluation
from training.flags import model, open_clip, train
from training.flags.config import config_words, format_config
from training.flags.effects import Effects, describe_idle, idle_flags
from training.flags.types import Calls, Flags, HelpFormatter, Switch
from training.runtime.experiment import Experiment, load_experiment

EFFECTS: Effects = (*model.EFFECTS, *train.EFFECTS, *open_clip.EFFECTS, *evaluation.EFFECTS)

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


class UsageError(ValueError):
    """The command line can't be run; the message names the flag and the reason."""


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> None:
        """Raises UsageError instead of exiting."""
        raise UsageError(message)

    @property
    def actions(self) -> dict[str, argparse.Action]:
        """The action of each flag, by the flag's name with its hyphens."""
        return dict(self._option_string_actions)  # argparse has no public name for it


def _print_help(parser: Parser, *_: object) -> None:
    build_parser(everything=False).print_help()
    parser.exit()


def _print_all_help(parser: Parser, *_: object) -> None:
    parser.print_help()
    parser.exit()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; the result must not be changed afterwards.

    Rank 0 prints a warning for each group of flags without an effect.

    Args:
        argv: words after the program's name; `sys.argv[1:]` if None. Flags are accepted with `-` or `_` between words.

    Raises:
        SystemExit: with code 2 and a one-line message for a usage error, 0 after --help and --print-config.
    """
    parser = early = _config_parser()
    words = [_with_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        files, _ = early.parse_known_args(words)
        first, _ = early.parse_known_args([*config_words(files.config, early.actions), *words])
        experiment = load_experiment(first.experiment) if first.experiment else Experiment
        set_further_benchmarks(experiment.benchmarks)
        parser = build_parser()
        experiment.add_flags(Flags(parser, f"experiment {first.experiment}"))
        args = parser.parse_args([*config_words(files.config, parser.actions, parser.parse_args), *words])
        if args.print_config:
            print(format_config(args, parser.actions), end="")
            parser.exit()
        if args.dataset_type == "synthetic" and not args.train_data:  # as in open_clip's commands
            args.train_data = args.dataset_type
        absent = find_below_data_root(args)
        known = vars(args).pop(open_clip.NO_EFFECT, [])
        for line in [*([absent] if absent else []), *known, *validate_args(args)]:
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
    group = parser.add_argument_group("help and config files")
    options = {"action": Calls, "nargs": 0}
    group.add_argument("--help", "-h", const=_print_help, help="show the most common flags and exit", **options)
    group.add_argument("--help-all", const=_print_all_help, help="show all flags and exit", **options)
    _add_config_args(group)
    model.add_model_args(parser, everything)
    evaluation.add_eval_args(parser, everything)
    train.add_train_args(parser, everything)
    model.add_compute_args(parser, everything)
    if everything:
        open_clip.add_open_clip_args(parser)
    return parser


def _config_parser() -> Parser:
    """Returns a parser of the flags that decide which others there are."""
    parser = Parser(prog=PROG, add_help=False, allow_abbrev=False)
    _add_config_args(parser)
    return parser


def _add_config_args(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="read flags from YAML files or recipes of this package, such as lotlip-cc3m; later files override earlier "
        "ones, and the command line overrides all",
    )
    group.add_argument(
        "--experiment",
        metavar="FILE",
        help="change parts of the training by the code in FILE.py[:CLASS], or in an importable module; see "
        "docs/experiments.md",
    )
    group.add_argument(
        "--allow-changed-experiment", action=Switch, help="resume with another --experiment than the run was begun with"
    )
    group.add_argument(
        "--print-config", action=Switch, help="print all flags of this command as a config file and exit"
    )


def validate_args(args: argparse.Namespace) -> list[str]:
    """Checks combinations of flags, and paths as far as possible without reading files.

    Returns:
        One line for each group of flags without an effect.

    Raises:
        ValueError: the message names the flag, what was found and what to do.
    """
    train.validate_train_args(args)
    evaluation.validate_eval_args(args)
    if not evaluation.has_benchmark(args) and not args.train_data and not args.val_data and not args.features:
        flags = (*evaluation.benchmark_flags(), "--features")
        raise ValueError(
            f"nothing to do: give --train-data, --val-data, or a data set with {', '.join(flags[:-1])} or {flags[-1]}"
        )
    model.validate_model_args(args)
    idle = idle_flags(args, vars(build_parser().parse_args([])), EFFECTS)
    for condition, flags in idle.items():
        if condition.refused:
            raise ValueError(describe_idle(condition, flags))
    return [describe_idle(condition, flags) for condition, flags in idle.items()]
