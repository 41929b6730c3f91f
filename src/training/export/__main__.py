"""python -m training.export RUN_OR_FILE --to open_clip|transformers|onnx --out FOLDER

RUN_OR_FILE: LOGS/NAME (its newest checkpoint), a checkpoint, any weights file with --model, or a folder of open_clip's
or transformers'. The folder that is written holds a model card, README.md, and export.json with the largest difference
between the features of 32 images and texts here and in the other software.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

FORMATS = ("open_clip", "transformers", "onnx")
TOLERANCE = 1e-3  # of normalised features; fp32 kernels differ by 1e-6, open_clip's SigLIP by its other activation


def main(argv: Sequence[str] | None = None) -> int:
    """Exports one model.

    Returns:
        Exit code: 0; 1 if the other software computes other features; 2 if the command can't be run as it stands.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="RUN_OR_FILE", help="what to export")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the other software")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--model", metavar="NAME", help="architecture of a weights file that lies in no run")
    parser.add_argument("--num-corner-tokens", type=int, metavar="M", help="of that model, if not its config's")
    parser.add_argument("--context-length", type=int, metavar="L", help="of that model, if not its config's")
    parser.add_argument("--cache-dir", metavar="DIR", help="where tokenizers are looked up first")
    parser.add_argument("--license", default="unknown", metavar="ID", help="of the weights, for the card: mit, ..")
    args = parser.parse_args(argv)
    try:
        return _export(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _export(args: argparse.Namespace) -> int:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out {args.out}: not empty; name a new folder")
    from training.export.card import write_card
    from training.export.source import NUM_CHECKED, load_source, own_features

    if args.to == "open_clip":
        from training.export.open_clip_folder import write_folder as write
    elif args.to == "transformers":
        from training.export.transformers_folder import write_folder as write
    else:
        from training.export.onnx_files import write_files as write
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
