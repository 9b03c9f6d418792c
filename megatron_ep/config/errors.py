"""Errors of configurations: each names the key, and suggests the nearest for an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from megatron_ep.config.fields import megatron_fields
from megatron_ep.config.schema import sections


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists all reasons."""


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for a similar known name, or else one that contains this; or ''."""
    names = list(known)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    matches = matches or sorted((k for k in names if name in k and len(name) > 2), key=len)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def unknown_key(section: str, key: str) -> str:
    """What to say about a key that the section does not have."""
    classes = sections()
    if section == "":
        return f"{key}: unknown section{nearest(key, [*classes, 'transformer'])}"
    for other, fields in classes.items():
        if key in fields.model_fields:
            return f"{section}.{key}: unknown key; did you mean {f'{other}.{key}'!r}?"
    if key in megatron_fields():
        return f"{section}.{key}: unknown key; did you mean {f'transformer.{key}'!r}?"
    own = list(classes[section].model_fields) if section in classes else []
    hint = nearest(key, own)
    if not hint:
        everywhere = [name for fields in classes.values() for name in fields.model_fields]
        hint = nearest(key, [*everywhere, *megatron_fields()])
    return f"{section}.{key}: unknown key{hint}"


def describe(error: ValidationError) -> list[str]:
    """One line for each error of a validation."""
    lines: dict[str, None] = {}
    for part in error.errors():
        names = [str(name) for name in part["loc"]]
        if part["type"] == "extra_forbidden":
            lines[unknown_key(".".join(names[:-1]), names[-1])] = None
        elif part["type"] == "value_error":
            lines[_join(names[:2], str(part["ctx"]["error"]))] = None
        else:
            lines[_join(names[:2], f"{part['msg']}, got {_short(part['input'])}")] = None
    return list(lines)


def _join(names: list[str], message: str) -> str:
    return f"{'.'.join(names)}: {message}" if names else message


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
