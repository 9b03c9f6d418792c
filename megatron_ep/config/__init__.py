"""The configuration of a training run: a YAML file and flags, checked against a schema.

load_config            reads a file
config_from_arguments  reads a command line
dump_config            writes a file that reads back to the same
"""

from megatron_ep.config.errors import ConfigError
from megatron_ep.config.load import (
    config_from_arguments,
    dump_config,
    load_config,
    make_config,
)
from megatron_ep.config.rules import check_world_size
from megatron_ep.config.schema import Config

__all__ = [
    "Config",
    "ConfigError",
    "check_world_size",
    "config_from_arguments",
    "dump_config",
    "load_config",
    "make_config",
]
