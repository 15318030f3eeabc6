"""EngineArgs, vLLM's object of all options of an LLM: scripts make it, or have the command line
make it, and hand it to from_engine_args. LLM checks the options; here they are only named."""

import argparse
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Any

from nanovllm.arguments import add_options, given_options
from nanovllm.config import VLLM_DEFAULTS, EngineConfig

MODEL = "Qwen/Qwen3-0.6B"  # vLLM's default


class _FromCommandLine:
    """What an EngineArgs has besides its fields."""

    @classmethod
    def add_cli_args(
        cls, parser: argparse.ArgumentParser, async_args_only: bool = False
    ) -> argparse.ArgumentParser:
        """Give a parser an option --like-this for each field, with its default. Returns it.

        Args:
            async_args_only: only for the fields that an EngineArgs does not have.
        """
        names = ASYNC_ONLY if async_args_only else None
        add_options(parser, "engine", cls, names, VLLM_DEFAULTS, with_defaults=True)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Any:
        """An object with the fields that a parser's result has."""
        return cls(**given_options(args, cls))


def _fields(defaults: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Fields for options of vLLM's without an implementation here. Where vLLM's default is an
    object, None asks for it too."""
    result = []
    for name, default in defaults.items():
        if default is None and name.startswith(("enable_", "disable_")):
            kind: Any = bool | None
        elif isinstance(default, bool | int | float | str):
            kind = type(default)
        else:
            kind, default = Any, None
        result.append((name, kind, field(default=default, repr=False)))
    return result


ASYNC_ONLY = {"enable_log_requests": False}
_OURS = [
    (f.name, f.type, field(default=MODEL if f.default is MISSING else f.default))
    for f in fields(EngineConfig)
]
_VLLMS = _fields({k: v for k, v in VLLM_DEFAULTS.items() if k not in ASYNC_ONLY})
EngineArgs = make_dataclass("EngineArgs", [*_OURS, *_VLLMS], bases=(_FromCommandLine,))
AsyncEngineArgs = make_dataclass("AsyncEngineArgs", _fields(ASYNC_ONLY), bases=(EngineArgs,))
for _cls in (EngineArgs, AsyncEngineArgs):
    _cls.__module__, _cls.__doc__ = __name__, EngineConfig.__doc__
