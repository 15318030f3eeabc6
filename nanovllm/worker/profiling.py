"""A profile of what runs between LLM.start_profile and stop_profile, by torch's profiler, for
ui.perfetto.dev."""

import time
from pathlib import Path
from typing import Any

from nanovllm.config import EngineConfig


class Profiler:
    """Where the engine's profiles go, and the one that is being taken.

    Raises:
        ValueError: profiler_config names no folder.
    """

    def __init__(self, config: EngineConfig):
        folder = (config.profiler_config or {}).get("torch_profiler_dir")
        if not folder:
            raise ValueError(
                "start_profile needs to know where to write: LLM(..., profiler_config={'profiler': "
                "'torch', 'torch_profiler_dir': FOLDER})"
            )
        self.folder = Path(folder)
        self.running: Any = None
        self.prefix = ""

    def start(self, prefix: str | None) -> None:
        """Raises RuntimeError if a profile is being taken."""
        from torch.profiler import profile

        if self.running is not None:
            raise RuntimeError("a profile is being taken already: stop_profile ends it")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prefix = prefix or f"nanovllm_{time.time_ns()}"
        self.running = profile()
        self.running.start()

    def stop(self) -> None:
        """Write it. Raises RuntimeError if none is being taken."""
        if self.running is None:
            raise RuntimeError("no profile is being taken: start_profile begins one")
        profiler, self.running = self.running, None
        profiler.stop()
        profiler.export_chrome_trace(str(self.folder / f"{self.prefix}.pt.trace.json.gz"))
