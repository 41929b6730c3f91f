"""What tests share: where the reference files are, and ways to run the command line as a user does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

REFERENCE = Path(__file__).parent / "reference"
LAYOUTS = REFERENCE / "layouts"


def layout_flags(root: Path, sizes: str = "8,12") -> list[str]:
    """Flags for all four benchmarks of a folder in the form of tests/reference/layouts."""
    return [
        f"--dci-retrieval={root / 'dci'}",
        f"--iiw-retrieval={root / 'iiw'}",
        f"--iiw-anno={root / 'iiw_annotations'}",
        f"--share4v-retrieval={root / 'share4v'}",
        f"--share4v-anno={root / 'share4v_sam.json'}",
        f"--share4v_val_num={sizes}",
        f"--urban1k-retrieval={root / 'urban1k'}",
    ]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now, all different."""
    probes = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def run_command(
    module: str, argv: list[str], num_processes: int = 1, timeout: int = 240
) -> subprocess.CompletedProcess:
    """Runs ``python -m MODULE ARGV`` as a user would; under torchrun if there is more than one process."""
    launcher = [sys.executable, "-m"]
    if num_processes > 1:
        ranks = ["--nproc_per_node", str(num_processes), "--master_port", str(free_ports(1)[0])]
        launcher += ["torch.distributed.run", *ranks, "-m", "--"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(launcher + [module, *argv], capture_output=True, text=True, timeout=timeout, env=env)


def read_results(logs: Path, name: str) -> dict:
    """The last line of a run's results.jsonl."""
    return json.loads((logs / name / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
