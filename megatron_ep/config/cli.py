"""Flags: every key of the schema and of Megatron's TransformerConfig, in Megatron's spelling.

--moe-router-topk 2      moe.moe_router_topk = 2
--sequence-parallel      parallelism.sequence_parallel = true
--no-sequence-parallel   ... = false
--no-load-rng            checkpoint.no_load_rng = true
--ep-num-sms 4           ep.num_sms = 4
--data-path a b          data.data_path = [a, b]
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_ep.config.errors import ConfigError, nearest
from megatron_ep.config.fields import megatron_fields
from megatron_ep.config.schema import sections

# Flags of Megatron-LM that are spelled differently here: (section, key, value or None to take one).
ALIASES: dict[str, tuple[str, str, Any]] = {
    "bf16": ("model", "precision", "bf16"),
    "fp16": ("model", "precision", "fp16"),
    "swiglu": ("model", "activation", "swiglu"),
    "squared-relu": ("model", "activation", "squared_relu"),
    "disable-bias-linear": ("model", "add_bias_linear", False),
    "norm-epsilon": ("model", "layernorm_epsilon", None),
    "num-moe-experts": ("moe", "num_experts", None),
    "apply-layernorm-1p": ("transformer", "layernorm_zero_centered_gamma", True),
    "recompute-activations": ("transformer", "recompute_granularity", "selective"),
    "fp8-format": ("transformer", "fp8", None),
}


def parse_flags(arguments: Sequence[str], *, program: str) -> tuple[str | None, dict[str, Any]]:
    """Reads the command line.

    Args:
        arguments: without the program's name.
        program: how it is called, for the help.

    Returns:
        The path of the configuration file (--config) and {section: {key: value}} of the flags;
        values are strings as given, to be converted by the schema.

    Raises:
        ConfigError: an unknown flag, with the nearest known one, or a flag without its value.
    """
    parser = make_parser(program)
    known, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        wrong = [word for word in unknown if word.startswith("--")]
        lines = [f"{word}: unknown flag{nearest(word.split('=')[0], flags)}" for word in wrong]
        if not wrong:
            lines = [f"{word}: not expected here" for word in unknown]
        raise ConfigError("\n".join(lines))
    values = vars(known)
    config = values.pop("config", None)
    overrides: dict[str, Any] = {}
    for name, value in values.items():
        section, key = name.split(".")
        overrides.setdefault(section, {})[key] = _plain(value, _annotation(section, key))
    return config, overrides


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError, where argparse prints all flags and exits."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def make_parser(program: str) -> argparse.ArgumentParser:
    """A parser of all flags; defaults are left to the schema."""
    parser = _Parser(
        prog=program,
        description="Values come from the YAML file; flags override it.",
        epilog="Any further field of Megatron-Core's TransformerConfig is a flag, too.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with every setting")
    for section, model in sections().items():
        group = parser.add_argument_group(section, (model.__doc__ or "").strip())
        prefix = "ep-" if section == "ep" else ""
        for key, field in model.model_fields.items():
            default = "" if field.default is None else f" (default: {field.default})"
            text = f"{field.description}{default}".replace("%", "%%")
            flag = f"--{prefix}{_dashes(key)}"
            _add_flag(group, flag, f"{section}.{key}", field.annotation, text)
    for key, annotation in megatron_fields().items():
        flag = f"--{_dashes(key)}"
        _add_flag(parser, flag, f"transformer.{key}", annotation, argparse.SUPPRESS)
    for name, (section, key, value) in ALIASES.items():
        if value is None:
            action: dict[str, Any] = {}
        else:
            action = {"action": "store_const", "const": value}
        parser.add_argument(f"--{name}", dest=f"{section}.{key}", help=argparse.SUPPRESS, **action)
    return parser


def _add_flag(group: Any, flag: str, dest: str, annotation: Any, text: str) -> None:
    parts = _parts(annotation)
    if bool in parts and flag.startswith("--no-"):
        # NOTE: argparse takes every flag of this form for the opposite of another one.
        group.add_argument(flag, dest=dest, action="store_true", help=text)
        opposite = f"--{flag.removeprefix('--no-')}"
        group.add_argument(opposite, dest=dest, action="store_false", help=argparse.SUPPRESS)
        return
    if bool in parts:
        group.add_argument(flag, dest=dest, action=argparse.BooleanOptionalAction, help=text)
        return
    many = any(_is_list(part) for part in parts)
    choices = [choice for part in parts for choice in _choices(part)]
    metavar = "{" + ",".join(choices) + "}" if choices else _dashes(dest.split(".")[1]).upper()
    group.add_argument(flag, dest=dest, nargs="+" if many else None, metavar=metavar, help=text)


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, annotations taken off."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    arguments = typing.get_args(annotation)
    if arguments and typing.get_origin(annotation) not in (list, tuple, dict, typing.Literal):
        return [part for argument in arguments for part in _parts(argument)]
    return [annotation]


def _choices(part: Any) -> list[str]:
    is_literal = typing.get_origin(part) is typing.Literal
    return [str(choice) for choice in typing.get_args(part)] if is_literal else []


def _is_list(part: Any) -> bool:
    return part is list or typing.get_origin(part) in (list, tuple)


def _annotation(section: str, key: str) -> Any:
    if section == "transformer":
        return megatron_fields()[key]
    return sections()[section].model_fields[key].annotation


def _plain(value: Any, annotation: Any) -> Any:
    """The value of a list of one, where the key also takes a single value; None for 'none'."""
    parts = _parts(annotation)
    if not isinstance(value, list):
        return None if _is_none(value, parts) else value
    takes_one = any(not _is_list(part) for part in parts if part is not type(None))
    if len(value) == 1 and (takes_one or _is_none(value[0], parts)):
        return _plain(value[0], annotation)
    return value


def _is_none(value: Any, parts: list[Any]) -> bool:
    """Whether it stands for None: that is allowed here, and 'none' is not one of the choices."""
    has_choice = any("none" in _choices(part) for part in parts)
    return type(None) in parts and not has_choice and str(value).lower() in ("none", "null")


def _dashes(name: str) -> str:
    return name.replace("_", "-")
