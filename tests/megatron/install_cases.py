"""What a rank does in test_install.py. One rank is enough: nothing here communicates."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
from typing import get_args
from unittest import mock

import moe_layers as layers
import pytest
import schedule_cases
from moe_layers import Case, Grid

GRID = Grid()


def _patched_places():
    from megatron.core.models.gpt import fine_grained_callables
    from megatron.core.transformer.moe import moe_layer
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer

    return {
        "annotation": _field().type,
        "post_init": TransformerConfig.__post_init__,
        "moe_layer": moe_layer.MoELayer.__init__,
        "transformer_layer": TransformerLayer.__init__,
        "free_input": fine_grained_callables.should_free_input,
        "alltoall": moe_layer.MoEAlltoAllTokenDispatcher,
    }


def _field():
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig.__dataclass_fields__["moe_token_dispatcher_type"]


def _config(dispatcher="deepep", **options):
    return layers.make_config(Case(options=options), GRID, dispatcher)


def check_round_trip(rank):
    """register() and unregister(), each twice, leave Megatron as it was."""
    import megatron_ep

    layers.import_megatron()
    before = _patched_places()
    for _ in range(2):
        megatron_ep.register()
        during = _patched_places()
        changed = {name for name in before if during[name] is not before[name]}
        assert changed == before.keys() - {"alltoall"}
    for _ in range(2):
        megatron_ep.unregister()
        assert _patched_places() == before


def check_unknown_without_register(rank):
    import megatron_ep

    with layers.megatron(GRID):
        layers.make_layer(Case(), GRID, "deepep")
        megatron_ep.unregister()
        with pytest.raises(ValueError, match="Unsupported token dispatcher type: deepep"):
            layers.make_layer(Case(), GRID, "deepep")
        megatron_ep.register()
        layers.make_layer(Case(), GRID, "deepep")


def check_patched_by_others(rank):
    """Undoing under somebody else's patch would lose theirs."""
    import megatron_ep

    with layers.megatron(GRID):
        from megatron.core.transformer.moe.moe_layer import MoELayer

        ours = MoELayer.__init__
        with (
            mock.patch.object(MoELayer, "__init__", return_value=None),
            pytest.raises(RuntimeError, match="MoELayer.*__init__ was replaced"),
        ):
            megatron_ep.unregister()
        assert MoELayer.__init__ is ours
        layers.make_layer(Case(), GRID, "deepep")


def check_flag(rank):
    """The choices of --moe-token-dispatcher-type come from the annotation."""
    with layers.megatron(GRID):
        from megatron.core.transformer.transformer_config import MLATransformerConfig

        choices = get_args(_field().type)
        assert choices == ("allgather", "alltoall", "flex", "deepep")
        of_subclass = MLATransformerConfig.__dataclass_fields__["moe_token_dispatcher_type"]
        assert get_args(of_subclass.type) == choices
        parser = argparse.ArgumentParser()
        parser.add_argument("--moe-token-dispatcher-type", choices=choices)
        flags = ["--moe-token-dispatcher-type", "deepep"]
        assert parser.parse_args(flags).moe_token_dispatcher_type == "deepep"


def check_name_is_kept(rank):
    """The config says deepep after its own checks, in copies, and when a check has failed."""
    with layers.megatron(GRID):
        config = _config()
        layer = layers.make_layer(Case(), GRID, "deepep")
        for each in (config, copy.deepcopy(config), dataclasses.replace(config), layer.config):
            assert each.moe_token_dispatcher_type == "deepep"
        failed = copy.copy(config)
        failed.num_moe_experts = -1
        with pytest.raises(ValueError, match="num_moe_experts"):
            failed.__post_init__()
        assert failed.moe_token_dispatcher_type == "deepep"


ACCEPTED = {
    "shared-expert overlap": dict(
        moe_shared_expert_intermediate_size=32, moe_shared_expert_overlap=True
    ),
    "1F1B overlap": dict(
        overlap_moe_expert_parallel_comm=True, bf16=True, expert_model_parallel_size=2
    ),
    "quantisation padding": dict(moe_router_padding_for_quantization=True, fp8="hybrid"),
    "variable sequence lengths": dict(variable_seq_lengths=True),
}
"""Features that the config refuses for dispatchers it does not know to have them."""


def check_accepted(rank, feature):
    """By deepep as by alltoall; the same options with allgather are refused as ever."""
    options = ACCEPTED[feature]
    # fp8 asks for the version of Transformer Engine.
    has_te = "megatron.core.transformer.transformer_config.is_te_min_version"
    with layers.megatron(GRID), mock.patch(has_te, return_value=True):
        _config("alltoall", **options)
        config = _config("deepep", **options)
        assert all(getattr(config, name) == value for name, value in options.items())
        with pytest.raises((ValueError, AssertionError)):
            _config("allgather", **options)


def check_layer_classes(rank):
    """MoELayer stays the class of the layer, subclasses work, other names get their own class."""
    with layers.megatron(GRID):
        from megatron.core.transformer.moe import moe_layer, token_dispatcher
        from megatron.core.transformer.spec_utils import build_module

        from megatron_ep import DeepEPTokenDispatcher

        layer = layers.make_layer(Case(), GRID, "deepep")
        assert type(layer) is moe_layer.MoELayer
        assert type(layer.token_dispatcher) is DeepEPTokenDispatcher
        for name, expected in (
            ("allgather", token_dispatcher.MoEAllGatherTokenDispatcher),
            ("alltoall", token_dispatcher.MoEAlltoAllTokenDispatcher),
        ):
            other = layers.make_layer(Case(), GRID, name)
            assert type(other.token_dispatcher) is expected

        class OwnLayer(moe_layer.MoELayer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)

        own = OwnLayer(_config(), layer.submodules, 1)
        assert type(own.token_dispatcher) is DeepEPTokenDispatcher

        config = _config()
        spoiled = dataclasses.replace(layer.submodules, experts=None)
        with pytest.raises(Exception, match="."):
            build_module(moe_layer.MoELayer, config=config, submodules=spoiled)
        assert config.moe_token_dispatcher_type == "deepep"
        assert moe_layer.MoEAlltoAllTokenDispatcher is token_dispatcher.MoEAlltoAllTokenDispatcher


def check_layernorm_recompute(rank):
    """The layernorm before the MoE layer is recomputed exactly when it is with alltoall."""
    with layers.megatron(GRID):
        from megatron.core.transformer.enums import CudaGraphScope as Scope

        scopes = ([Scope.attn], [Scope.moe_router], [Scope.moe_router, Scope.moe_preprocess])
        shared = dict(moe_shared_expert_intermediate_size=32)
        seen = set()
        for scope, modules, options, overlap in itertools.product(
            scopes, (["layernorm"], ["core_attn"]), ({}, shared), (False, True)
        ):
            case = Case(
                options={
                    **schedule_cases.LAYER_OPTIONS,
                    **options,
                    "recompute_granularity": "selective",
                    "recompute_modules": modules,
                    "moe_shared_expert_overlap": overlap,
                },
                late_options=dict(cuda_graph_impl="transformer_engine", cuda_graph_scope=scope),
            )
            of_alltoall, of_deepep = (
                schedule_cases.make_transformer_layer(case, GRID, name).recompute_pre_mlp_layernorm
                for name in ("alltoall", "deepep")
            )
            assert of_deepep == of_alltoall, case
            seen.add((len(scope), of_deepep))
        assert seen == {(1, False), (1, True), (2, False), (2, True)}


def check_freed_inputs(rank):
    """As with alltoall, but the experts' input, which is what they save, is kept."""
    with layers.megatron(GRID):
        from megatron.core.models.gpt.fine_grained_callables import should_free_input

        alltoall, deepep = _config("alltoall"), _config("deepep")
        for name in ("attn", "moe_dispatch", "mlp", "moe_combine", "mtp_post_process"):
            expected = should_free_input(name, True, alltoall) and name != "mlp"
            assert should_free_input(name, True, deepep) == expected
            assert not should_free_input(name, False, deepep)
        assert should_free_input("mlp", True, alltoall)
        assert should_free_input("moe_dispatch", True, deepep)


def compare_replaced_dispatcher(rank, grid):
    """Without register(): a layer of alltoall whose dispatcher is replaced when it exists."""
    import megatron_ep

    case = Case()
    with layers.megatron(grid):
        megatron_ep.unregister()
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

        judge, layer = (layers.make_layer(case, grid, "alltoall") for _ in range(2))
        layer.token_dispatcher = megatron_ep.DeepEPTokenDispatcher(
            layer.num_local_experts,
            layer.local_expert_indices,
            config=layer.config,
            pg_collection=get_default_pg_collection(),
        )
        expected, actual = (layers.run_layer(rank, each, case) for each in (judge, layer))
        return [layers.compare(rank, expected, actual)]
