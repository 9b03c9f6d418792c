"""dispatch and combine are each the other's backward, for rows and for weights."""

import autograd_cases as cases
import pytest
import torch

from ep_kernels import Layout

RANKS = pytest.mark.parametrize("num_ranks", [1, 2, 4], ids="R{}".format)
LAYOUTS = pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.name)


@RANKS
@LAYOUTS
def test_output_and_gradients_have_their_closed_form(ranks, backend, num_ranks, layout):
    ranks.run(cases.check_closed_form, backend, layout, 1)


def test_padding_rows_have_no_influence(ranks, backend):
    ranks.run(cases.check_closed_form, backend, Layout.EXPERT_MAJOR, 4)


@pytest.mark.parametrize("num_ranks", [1])
@LAYOUTS
def test_first_and_second_derivatives_are_right(ranks, num_ranks, layout):
    ranks.run(cases.check_gradcheck, "cpu", layout)


@RANKS
@LAYOUTS
def test_backward_is_the_adjoint(ranks, backend, num_ranks, layout):
    ranks.run(cases.check_adjoint, backend, layout)


@LAYOUTS
def test_nothing_of_the_forward_is_needed_for_the_backward(ranks, backend, layout):
    ranks.run(cases.check_nothing_saved, backend, layout)


@LAYOUTS
def test_several_layers_and_batches_are_in_flight_at_once(ranks, backend, layout):
    ranks.run(cases.check_many_in_flight, backend, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@LAYOUTS
def test_parts_of_the_call_may_be_left_out(ranks, backend, layout, dtype):
    ranks.run(cases.check_parts, backend, layout, dtype)


def test_what_has_no_gradient_is_refused(ranks, backend):
    ranks.run(cases.check_refusals, backend)
