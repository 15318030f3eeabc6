"""vLLM's defaults, read from an EngineArgs object of its own, into nanovllm/core/vllm_options.json.

    python tools/vllm_defaults.py

vLLM must be importable; a GPU is not needed. Which options only tune speed, and which other values
have the same effect here, is written by hand in the same file.
"""

import json
from pathlib import Path

from nanovllm.config import plain

TABLE = Path(__file__).parents[1] / "nanovllm" / "core" / "vllm_options.json"


def main() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    defaults = {name: plain(value) for name, value in vars(AsyncEngineArgs()).items()}
    table = json.loads(TABLE.read_text())
    for section in ("speed_only", "supported_at_default", "config_objects"):
        for name in table[section]:
            table[section][name] = defaults.get(name, table[section][name])
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
