"""Command-line options made from the fields of EngineConfig and SamplingParams: name, type and help
of an option are the field's, so that no second list exists. cli.py calls it."""

import argparse
import json
import re
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, get_args, get_origin


def add_options(
    parser: argparse.ArgumentParser, title: str, cls: Any, names: Collection[str] | None = None
) -> None:
    """Add an option --like-this for each field of a dataclass whose docstring has Args.

    An option that is not given leaves no attribute in the parsed arguments.

    Args:
        names: the fields to add; None: all.
    """
    group = parser.add_argument_group(title)
    texts = _help_texts(cls.__doc__)
    for field in fields(cls):
        if field.init and (names is None or field.name in names):
            how = _how_to_read(field.type)
            if field.default is MISSING and field.default_factory is MISSING:
                how["required"] = True
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                default=argparse.SUPPRESS,
                help=texts.get(field.name, "").replace("%", "%%"),
                **how,
            )


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
    if kinds in ([int], [float], [str]):
        return {"type": kinds[0], "metavar": kinds[0].__name__.upper()}
    return {"type": json_value, "metavar": "JSON"}


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
