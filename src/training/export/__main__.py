"""python -m training.export RUN_OR_FILE --to open_clip|transformers|onnx --out FOLDER

RUN_OR_FILE is a run's folder LOGS/NAME (its newest checkpoint is exported), a checkpoint, any weights file with
--model, or a folder in open_clip's or transformers' format. The output folder also contains a model card, README.md,
and export.json, with the largest difference between the features of 32 images and texts computed here and by the other
software. --push-to-hub uploads it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.flags.types import command_parser

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Maximum difference of normalised features. fp32 kernels differ by 1e-6; open_clip's SigLIP has another activation.
TOLERANCE = 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    """Exports one model.

    Returns:
        Exit code: 0 for success; 1 if the other software computes different features; 2 for usage errors.
    """
    parser = command_parser("training.export", __doc__, Path(__file__).with_name("flags.yaml"))
    args = parser.parse_args(argv)
    try:
        return _export(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _export(args: argparse.Namespace) -> int:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out {args.out}: not empty; give a new folder")
    if args.push_to_hub:
        _on_hub(args.push_to_hub, lambda api: api.whoami())  # before the work
    from training.export.card import write_card
    from training.export.source import NUM_CHECKED, load_source, own_features

    if args.to == "onnx":
        from training.export.onnx_files import write_onnx as write
    elif args.to == "transformers":
        from training.export.folders import write_transformers as write
    else:
        from training.export.folders import write_open_clip as write
    source = load_source(args.source, args)
    own = own_features(source)
    args.out.mkdir(parents=True, exist_ok=True)
    theirs = write(source, args.out)
    largest = {kind: float((own[kind] - theirs[kind]).abs().max()) for kind in own}
    report = {"to": args.to, "source": source.name, "samples": NUM_CHECKED, "largest_difference": largest}
    (args.out / "export.json").write_text(json.dumps(report, indent=1) + "\n")
    write_card(source, args.out, args.to, args.license, largest)
    for kind, value in largest.items():
        print(f"{kind} features of {NUM_CHECKED} samples, largest difference: {value:.1e}")
    print(f"Written: {args.out}")
    if max(largest.values()) > TOLERANCE:
        print(f"python -m training.export: error: features differ by more than {TOLERANCE:g}", file=sys.stderr)
        return 1
    if repo := args.push_to_hub:
        _on_hub(repo, lambda api: api.create_repo(repo, private=args.private, exist_ok=True))
        print(f"Uploaded: {_on_hub(repo, lambda api: api.upload_folder(repo_id=repo, folder_path=args.out))}")
    return 0


def _on_hub(repo: str, call: Callable[["HfApi"], object]) -> object:
    """Calls a function with the hub's client; its errors, and those of the network, name ``--push-to-hub``."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        return call(HfApi())
    except Exception as error:  # the client's library for HTTP, and so the class of its errors, depends on its version
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--push-to-hub {repo}: {reason}; log in with a token that may write: hf auth login"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
