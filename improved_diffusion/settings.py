"""From a YAML file and command-line flags to frozen dataclasses of settings.

A YAML file fills the dataclass and flags override it (`--training.lr 1e-4`); jsonargparse does the parsing, and names
the key of whatever is unknown or of the wrong type.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import math
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jsonargparse
import yaml

from improved_diffusion.errors import UserError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

LARGEST = 2**63  # whole number that PyTorch and numpy count with

# What a user writes for a value of a type, as jsonargparse's complaints name types.
WRITTEN = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "tuple": "a list in brackets",
    "list": "a list in brackets",
    "dict": "keys and values",
    "NoneType": "null",
}


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def settings_parser(kind: type, **kwargs: Any) -> jsonargparse.ArgumentParser:
    """A parser with a flag for every setting of the dataclass `kind`: `--loss`, `--training.lr`, ... Its attributes are
    as given: `prog`, `description`."""
    parser = copy.deepcopy(_shared_parser(kind))
    vars(parser).update(kwargs)
    return parser


@functools.cache
def _shared_parser(kind: type) -> jsonargparse.ArgumentParser:
    """To make one takes longer than to parse a file with it, or to copy it."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(kind)
    return parser


def parse_arguments(
    parser: jsonargparse.ArgumentParser, arguments: list[str], settings: dict[str, Any] | None = None, source: str = ""
) -> jsonargparse.Namespace:
    """Parse the flags in `arguments`, which override `settings` (read from `source`), which override the defaults.

    Raises:
        UserError: an unknown key or a wrong type; the message names the key and where it was.
    """
    where, filled = source, None
    try:
        if settings:
            defaults = parser.get_defaults()
            for name, value in settings.items():
                if isinstance(defaults.get(name), argparse.Namespace) and not isinstance(value, dict):
                    raise UserError(f"in {source}: {name} is a group of settings and cannot be {value!r}")
            filled = parser.parse_object(settings)
            if not arguments:
                return filled
        where = "the command line"
        return parser.parse_args(arguments, namespace=filled)
    except argparse.ArgumentError as error:
        raise UserError(f"in {where}: {_in_words(str(error))}") from error


def _in_words(complaint: str) -> str:
    """jsonargparse's complaint about a value, without Python's types; another complaint as it is."""
    keys = re.findall(r'Parser key "([^"]+)"', complaint)
    types = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", complaint)
    value = re.search(r"(?:Got value|Given value): (.*)", complaint)
    if not (keys and types and value):
        of_item = re.fullmatch(r'Parser key "(\w+)":\s+Problem with given class_path \S+\s+(.*)', complaint)
        return f"{of_item[1]}: {of_item[2]}" if of_item else complaint  # of a list, each with settings of its own
    wanted = " or ".join(WRITTEN.get(name, name) if name else f"one of {choices}" for name, choices in types)
    example = f", '[{value[1]}]' say" if ("tuple", "") in types else ""
    return f"{'.'.join(keys)} must be {wanted}{example}, not {value[1]}"


def to_settings(kind: type[Settings], parser: jsonargparse.ArgumentParser, parsed: jsonargparse.Namespace) -> Settings:
    """The settings of `kind` among the parsed arguments.

    Raises:
        UserError: a value that is out of range, or does not fit another one.
    """
    _require_values(kind, parsed)
    filled = vars(parser.instantiate(parsed))
    return kind(**{field.name: filled[field.name] for field in dataclasses.fields(kind)})


def _require_values(kind: type, values: argparse.Namespace, group: str = "") -> None:
    """Refuse what jsonargparse lets pass: null for a setting that cannot be null, and numbers that no setting takes.

    Raises:
        UserError: the message names the setting.
    """
    for name, hint in typing.get_type_hints(kind).items():
        if not hasattr(values, name):  # of an item of a list in the command line there is only what was given
            continue
        value, key = getattr(values, name), group + name
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            _require_values(hint, value, f"{key}.")
            continue
        may_be_null = type(None) in typing.get_args(hint)
        require(value is not None or may_be_null, f"{key} cannot be null: give a value, or leave it out")
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, argparse.Namespace):  # of a list of settings
                _require_values(typing.get_args(hint)[0], item, f"{key}.")
            elif isinstance(item, (int, float)):
                limit = LARGEST if isinstance(item, int) else math.inf  # neither inf nor nan is below that
                require(abs(item) < limit, f"{key} must be a finite number, and a whole one below 2^63, not {item}")


def read_settings(path: Path | str) -> dict[str, Any]:
    """The settings in a YAML file, without the `provenance` that a finished run's config.yaml adds.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    return plain_settings(settings_text(path), path)


def settings_text(path: Path | str) -> str:
    """The text of a file of settings. Raises UserError: no such file, or it cannot be read."""
    try:
        return Path(path).read_text()
    except FileNotFoundError:
        raise UserError(f"no config at {path}: see configs/ for those that ship with the project") from None
    except (OSError, ValueError) as error:
        raise UserError(f"could not read the config {path}: {error}") from error


def plain_settings(text: str, source: Path | str) -> dict[str, Any]:
    """The settings that `text`, of the file `source`, says; see `read_settings`."""
    try:
        settings = yaml.safe_load(text) or {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # of 2026-99-99, for one
        raise UserError(f"could not read the config {source}: {error}") from error
    require(isinstance(settings, dict), f"the config {source} must hold keys and values, not {type(settings).__name__}")
    settings.pop("provenance", None)
    return settings


def load_settings(kind: type[Settings], path: Path | str) -> Settings:
    """The settings of `kind` in a YAML file. Raises UserError as the functions above do."""
    return settings_of(kind, read_settings(path), str(path))


def settings_of(kind: type[Settings], plain: dict[str, Any], source: str) -> Settings:
    """The settings of `kind` whose plain form (see `to_plain`) came from `source`. Raises UserError likewise."""
    parser = _shared_parser(kind)
    return to_settings(kind, parser, parse_arguments(parser, [], plain, source))


def to_plain(settings: Any) -> dict[str, Any]:
    """Settings as plain dicts, lists and values, fit for YAML."""
    return yaml.safe_load(yaml.safe_dump(dataclasses.asdict(settings, dict_factory=_lists_for_tuples)))


def _lists_for_tuples(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}
