"""Environments for the peers: each has its own packages, which take precedence over the ones installed here."""

import subprocess
import sys
import sysconfig
from pathlib import Path

REQUIREMENTS = {
    "open_clip_train": ("webdataset==0.2.86", "pandas"),  # its data pipeline uses functions that 1.x has removed
    "clip_benchmark": ("clip-benchmark==1.6.2", "webdataset==0.2.86", "requests"),
}


def make_environment(folder: Path, peer: str) -> Path:
    """Makes a virtual environment for a peer, unless it exists; returns its Python.

    PyTorch and open_clip are those of the current environment, so that both sides compute with the same libraries.

    Raises:
        subprocess.CalledProcessError: pip can't install the peer's packages.
    """
    home = folder / peer
    python = home / "bin" / "python"
    if not (home / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        own = Path(subprocess.check_output([python, "-c", _SITE], text=True).strip())
        (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--no-warn-conflicts", *REQUIREMENTS[peer]], check=True
        )
        (home / "ready").touch()
    return python


_SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
