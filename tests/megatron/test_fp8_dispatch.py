"""Rows that travel as fp8 give what rows give that were rounded to fp8 before they left."""

import fp8_cases as cases
import pytest
import torch
from differences import GPU_ROUNDING

pytestmark = pytest.mark.over_devices


def check(by_rank, names, dtype, atol):
    for results in by_rank:
        for name, differences in zip(names, results, strict=True):
            wrong = [d for d in differences if d.max_abs > max(atol, d.scale * GPU_ROUNDING[dtype])]
            assert not wrong, f"{name}: {wrong}"


def test_experts_get_the_rounded_rows_in_one_piece_and_in_chunks(ranks):
    by_rank = ranks.run(cases.compare_variants, torch.float32, deadline_s=120)
    check(by_rank, cases.VARIANTS, torch.float32, 1e-3)
    for results in by_rank:
        outputs = [d for differences in results for d in differences if d.name == "output"]
        assert all(d.is_bitwise or d.scale for d in outputs)


def test_other_options_of_the_layer_are_kept(ranks):
    by_rank = ranks.run(cases.compare_options, deadline_s=120)
    check(by_rank, ["shared", "recomputed"], torch.float32, 0)


def test_the_rounding_is_small_and_there(ranks):
    for errors in ranks.run(cases.relative_errors):
        assert all(0 < error < 0.2 for error in errors.values()), errors
        assert errors["output"] < 0.06


def test_only_rows_of_the_forward_are_fp8(ranks):
    for sent in ranks.run(cases.dtypes_sent):
        assert sent == [(torch.float8_e4m3fn, torch.float32), torch.bfloat16]


def test_a_hidden_size_without_whole_groups_is_refused(ranks):
    with pytest.raises(Exception, match="hidden size is 16"):
        ranks.run(cases.make_narrow_layer)
