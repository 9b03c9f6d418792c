"""From a YAML file and flags to a checked Config."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_ep.config.cli import parse_flags
from megatron_ep.config.errors import ConfigError, describe, unknown_key
from megatron_ep.config.fields import check_megatron_field, megatron_fields
from megatron_ep.config.rules import check_rules
from megatron_ep.config.schema import Config, sections

# Sections in which fields of TransformerConfig may stand, too.
_OPEN_SECTIONS = ("model", "parallelism", "moe", "transformer")


def load_config(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Reads and checks a configuration.

    Args:
        path: YAML file; None takes the defaults.
        overrides: {section: {key: value}} in place of what the file says.

    Raises:
        ConfigError: every unknown key, with the nearest known one, and every value of a wrong type.

    Example:
        >>> load_config(None, {"model": {"num_layers": "2"}}).model.num_layers
        2
    """
    origin = str(path) if path is not None else "configuration"
    values = _read(path) if path is not None else {}
    return make_config(_override(values, overrides or {}), origin=origin)


def config_from_arguments(arguments: Sequence[str], *, program: str) -> Config:
    """The configuration that a command line asks for: --config FILE and flags."""
    path, overrides = parse_flags(arguments, program=program)
    return load_config(path, overrides)


def make_config(values: dict[str, Any], *, origin: str = "configuration") -> Config:
    """Checks {section: {key: value}}; see load_config."""
    problems: list[str] = []
    plain, extra = _split(values, problems)
    checked = {}
    for name, value in extra.items():
        try:
            checked[name] = check_megatron_field(name, value)
        except ValueError as error:
            problems.append(f"transformer.{name}: {error}")
    try:
        config = Config.model_validate({**plain, "transformer": checked})
        if not problems:
            problems += check_rules(config)
    except ValidationError as error:
        problems += describe(error)
    if problems:
        raise ConfigError("\n".join([f"{origin}:", *(f"  {line}" for line in problems)]))
    return config


def dump_config(config: Config) -> str:
    """YAML text that load_config reads back to the same configuration."""
    values = config.model_dump(mode="python")
    values["transformer"] = {k: _yaml_value(v) for k, v in values["transformer"].items()}
    return yaml.safe_dump(values, sort_keys=False)


def _yaml_value(value: Any) -> Any:
    """Types, enumerations and tuples as what is written for them in YAML."""
    from megatron_ep.config.fields import DTYPES

    names = {dtype: name for name, dtype in DTYPES.items()}
    if isinstance(value, (list, tuple)):
        return [_yaml_value(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    return names.get(value, value) if value.__hash__ else value


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which PyYAML would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        known: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in known:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            known.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections, got {type(values).__name__}")
    return values


def _override(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The values with overrides in their place, whichever of the open sections names a key."""
    merged = dict(values)
    for section, changes in overrides.items():
        for other in _OPEN_SECTIONS:
            content = merged.get(other)
            if section in _OPEN_SECTIONS and isinstance(content, dict):
                merged[other] = {key: v for key, v in content.items() if key not in changes}
        content = merged.get(section)
        if content is None or isinstance(content, dict):
            merged[section] = {**(content or {}), **changes}
    return merged


def _split(
    values: dict[str, Any], problems: list[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Parts what the schema names from fields of TransformerConfig."""
    plain: dict[str, dict[str, Any]] = {}
    extra: dict[str, Any] = {}
    for section, content in values.items():
        if section not in sections() and section != "transformer":
            problems.append(unknown_key("", str(section)))
        elif content is not None and not isinstance(content, dict):
            problems.append(f"{section}: expected keys and values, got {content!r}")
        else:
            for key, value in (content or {}).items():
                own = section in sections() and key in sections()[section].model_fields
                if own:
                    plain.setdefault(section, {})[key] = value
                elif section in _OPEN_SECTIONS and key in extra:
                    problems.append(f"{section}.{key}: stands in another section, too")
                elif section in _OPEN_SECTIONS and key in megatron_fields():
                    extra[key] = value
                else:
                    problems.append(unknown_key(section, str(key)))
    return plain, extra
