"""The command line's arguments: vLLM's FlexibleArgumentParser, and options made from the fields of
dataclasses: name, type and help of an option are the field's, so that no second list exists.

engine_args.py and entrypoints/cli.py call it.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, get_args, get_origin

# As in vLLM: small letters are powers of 1000, large ones of 1024.
UNITS = {unit: 1000**i for i, unit in enumerate("kmgt", 1)}
UNITS |= {unit: 1024**i for i, unit in enumerate("KMGT", 1)}


class FlexibleArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser whose options may be written with underscores or dashes, whose whole
    numbers may be 1k (1000), 2K (2048), 1.5m or 64G, and that sets entries of a JSON option by
    `--option.key value`. Arguments are ArgumentParser's."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.register("type", int, whole_number)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        options = given[: given.index("--")] if "--" in given else given
        rest = given[len(options) :]
        return super().parse_known_args([*self._joined(options), *rest], namespace)

    def _joined(self, args: list[str]) -> list[str]:
        """The arguments, options under their own names; entries of an option as one JSON object."""
        result: list[str] = []
        entries: dict[str, dict[str, Any]] = {}
        words = iter(args)
        for word in words:
            name, equals, value = word.partition("=")
            name, *keys = name.split(".") if name.startswith("--") else [name]
            known = self._own_name(name)
            if not keys or known is None:
                result.append((known or name) + word[len(name) :])
                continue
            place = entries.setdefault(known, {})
            for key in keys[:-1]:
                place = place.setdefault(key, {})
            place[keys[-1]] = _json_or_text(value if equals else next(words, ""))
        return result + [f"{name}={json.dumps(value)}" for name, value in entries.items()]

    def _own_name(self, option: str) -> str | None:
        """The name by which the parser has an option; None: it has none."""
        body = option[2:]
        names = (option, "--" + body.replace("_", "-"), "--" + body.replace("-", "_"))
        is_long = option.startswith("--")
        return next((n for n in names if is_long and n in self._option_string_actions), None)


def whole_number(text: str) -> int:
    """The number of "4096", "4k" (4000), "4K" (4096), "1.5m" or "64G"."""
    found = re.fullmatch(r"(\d+)(\.\d+)?([kmgtKMGT])", text.strip())
    if not found:
        return int(text)
    whole, fraction, unit = found.groups()
    if fraction and unit.isupper():
        raise argparse.ArgumentTypeError(
            f"{text!r}: {unit} multiplies whole numbers by a power of 1024; "
            f"{whole + fraction}{unit.lower()} is a decimal number"
        )
    return (
        round(float(whole + (fraction or "")) * UNITS[unit])
        if fraction
        else int(whole) * UNITS[unit]
    )


def number_or_auto(text: str) -> int | None:
    """A whole number, or None for "auto"."""
    return None if text.strip().lower() == "auto" else whole_number(text)


number_or_auto.__name__ = "int"  # what argparse's message calls it


def add_options(
    parser: argparse.ArgumentParser,
    title: str,
    cls: Any,
    names: Collection[str] | None = None,
    hidden: Collection[str] = (),
    required: Collection[str] = (),
    *,
    with_defaults: bool = False,
) -> None:
    """Add an option --like-this for each field of a dataclass whose docstring has Args.

    Args:
        names: the fields to add; None: all.
        hidden: fields without a line in the help.
        required: fields that must be given, besides fields without a default.
        with_defaults: an option that is not given has its field's default; else it leaves no
            attribute in the parsed arguments.
    """
    group = parser.add_argument_group(title)
    texts = _help_texts(cls.__doc__)
    for field in fields(cls):
        if field.init and (names is None or field.name in names):
            how = _how_to_read(field.type)
            default = field.default
            if default is MISSING and field.default_factory is not MISSING:
                default = field.default_factory()
            if default is MISSING or field.name in required:
                how["required"] = True
            help = texts.get(field.name, "").replace("%", "%%")
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                *SHORT.get(field.name, ()),
                default=default if with_defaults else argparse.SUPPRESS,
                help=argparse.SUPPRESS if field.name in hidden else help,
                **how,
            )


SHORT = {"tensor_parallel_size": ["-tp"], "pipeline_parallel_size": ["-pp"]}


def given_options(args: argparse.Namespace, cls: Any) -> dict[str, Any]:
    """The dataclass's fields that the command line gave."""
    return {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}


def _how_to_read(kind: Any) -> dict[str, Any]:
    """add_argument's arguments for a field of that type."""
    kinds = [k for k in get_args(kind) or (kind,) if k not in (NoneType, Callable)]
    lists = [k for k in kinds if get_origin(k) is list]
    if lists:
        [element] = get_args(lists[0])
        return {"type": element, "nargs": "+", "metavar": element.__name__.upper()}
    if kinds == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    if set(kinds) == {bool, str}:
        return {"type": str, "nargs": "?", "const": True, "metavar": "STR"}
    if kinds == [int]:
        optional = NoneType in get_args(kind)
        return {"type": number_or_auto if optional else whole_number, "metavar": "INT"}
    if kinds in ([float], [str]):
        return {"type": kinds[0], "metavar": kinds[0].__name__.upper()}
    if kinds == [Any]:
        return {"type": _json_or_text, "metavar": "JSON"}
    return {"type": json_value, "metavar": "JSON"}


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None


def _help_texts(doc: str) -> dict[str, str]:
    """Name -> its text in the Args of a docstring."""
    entries = re.findall(r"^ {8}(\w[\w, \n]*?): (.*?)(?=^ {8}\w|^\s*$|\Z)", doc, re.M | re.S)
    return {
        name: " ".join(text.split())
        for names, text in entries
        for name in re.split(r"[,\s]+", names)
    }
