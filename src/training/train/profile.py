"""--profile: what the operations of a few steps take."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP, RECORDED, ROWS = 10, 5, 10
logger = logging.getLogger(__name__)


class StepProfile:
    """Records steps 11 to 15 of this process, without overhead afterwards; a context manager.

    Args:
        folder: folder for ``trace.json.gz`` (for ui.perfetto.dev) and ``table.txt``.
        device: device of the model.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        stages = schedule(skip_first=WARM_UP - 2, wait=0, warmup=2, active=RECORDED, repeat=1)
        self.profiler = profile(activities=activities, schedule=stages, on_trace_ready=self._write)
        self.is_written = False

    def __enter__(self) -> "StepProfile":
        self.profiler.start()
        return self

    def step(self) -> None:
        """Marks the end of a step."""
        if not self.is_written:
            self.profiler.step()

    def __exit__(self, *_: object) -> None:
        self.profiler.stop()  # writes what has been recorded so far
        if not self.is_written:
            logger.warning(
                f"--profile {self.folder}: nothing recorded, because training ended before step {WARM_UP + 1}"
            )

    def _write(self, profiler: profile) -> None:
        self.is_written = True
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "table.txt").write_text(table)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        logger.info(f"profile of up to {RECORDED} steps, with a trace for ui.perfetto.dev in {self.folder}:\n{table}")
