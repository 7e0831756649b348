"""The fields of RunConfig as options of a command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from lowrank_lab.config import RENAMED, InputError, RunConfig
from lowrank_lab.studies.plain_yaml import read_value

# Fields that are dictionaries: their owner, for the help text, and their short flag.
PAIRS = {
    "method_options": ("method", "--option"),
    "optimizer_options": ("optimizer", "--optimizer-option"),
}


def config_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one option per field of RunConfig, and hidden options for earlier field names."""
    for name, field in reversed(RunConfig.model_fields.items()):
        flag, text = f"--{name.replace('_', '-')}", field.description or ""
        if field.annotation is bool:
            option = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
        elif name in PAIRS:
            whose, short = PAIRS[name]
            text = f"option of the {whose} as NAME=VALUE; may be repeated"
            option = click.option(flag, short, name, multiple=True, help=text)
        else:
            if field.default is not None:
                text += f" [default: {field.default}]"
            option = click.option(flag, name, default=None, metavar="VALUE", help=text)
        command = option(command)
    for old in RENAMED:
        flag = f"--{old.replace('_', '-')}"
        if RunConfig.model_fields[RENAMED[old]].annotation is bool:
            flag += f"/--no-{flag[2:]}"
        command = click.option(flag, old, default=None, hidden=True)(command)
    return command


def check_switches(words: Sequence[str]) -> None:
    """Refuse a switch with a value, as in `--compile false`.

    Raises:
        InputError: of its field, with both spellings.
    """
    switches = {
        f"--{no}{name.replace('_', '-')}": name
        for name, field in RunConfig.model_fields.items()
        for no in ("", "no-")
        if field.annotation is bool
    }
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        value = value if equals or following.startswith("-") else following
        if flag in switches and (equals or value):
            flag = f"--{switches[flag].replace('_', '-')}"
            allowed = f"a switch has no value: {flag} for true, --no-{flag[2:]} for false"
            raise InputError(switches[word.partition("=")[0]], value, allowed)


def given_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags set on the command line."""
    return {name: value for name, value in flags.items() if value not in (None, ())}


def config_of(flags: dict[str, Any]) -> RunConfig:
    given = given_flags(flags)
    for field in PAIRS.keys() & given.keys():
        given[field] = _options(field, given[field])
    return RunConfig(**given)


def _options(field: str, pairs: Iterable[str]) -> dict[str, Any]:
    """The options of a field from texts NAME=VALUE."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(field, pair, "must be NAME=VALUE")
        if name in options:
            raise InputError(field, pair, f"{name} is given twice")
        options[name] = read_value(value, f"{field}.{name}")
    return options
