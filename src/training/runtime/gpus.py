"""GPUs whose peak and memory are known. Imports nothing heavy."""

from pathlib import Path

import yaml

# Name -> [FLOP/s of 16-bit matrix products, bytes of memory]
GPUS: dict[str, list[float]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
