"""python -m nanovllm: generate, chat and run-batch; what they do is in entrypoints/."""

import sys

from nanovllm.entrypoints.cli import main

if __name__ == "__main__":
    sys.exit(main())
