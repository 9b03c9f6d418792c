"""The timeline: what it records, what it writes, and what it says about overlap."""

import json

import moe_layers as layers
import pytest
import training_runs as runs
from moe_layers import Case, Grid
from rank_devices import rank_device

from megatron_ep import trace
from megatron_ep.trace import EXPERTS, TRANSFERS, Span


def on_rank_trace(rank, num_chunks):
    case, grid = Case(seq_length=(64,)), Grid(ep=2)
    rank_device()
    tracer = trace.start_tracing()
    try:
        with layers.megatron(grid, num_chunks=num_chunks):
            layer = layers.make_layer(case, grid, "deepep")
            layers.run_layer(rank, layer, case)
            with tracer.recording():
                layers.run_layer(rank, layer, case)
            layers.run_layer(rank, layer, case)
            return tracer.spans()
    finally:
        trace.stop_tracing()


@pytest.mark.over_devices
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_every_transfer_and_every_run_of_the_experts_is_recorded(ranks, num_chunks, tmp_path):
    spans_of_ranks = ranks.run(on_rank_trace, num_chunks)
    for spans in spans_of_ranks:
        names = [(span.track, span.name) for span in spans]
        for track, kinds in (
            (TRANSFERS, ("dispatch", "combine")),
            (EXPERTS, ("forward", "backward")),
        ):
            per_chunk = 2 if track == TRANSFERS else 1
            for kind in kinds:
                assert names.count((track, kind)) == per_chunk * num_chunks
        assert all(span.begin_ns <= span.end_ns for span in spans)
    path = tmp_path / "folder" / "trace.json"
    trace.write_trace(path, spans_of_ranks)
    events = json.loads(path.read_text())["traceEvents"]
    drawn = [event for event in events if event["ph"] == "X"]
    assert len(drawn) == sum(map(len, spans_of_ranks))
    assert {event["pid"] for event in drawn} == {0, 1}
    assert min(event["ts"] for event in drawn) == 0


def test_training_writes_a_timeline_of_the_steps_asked_for(programs, corpus, tmp_path):
    path = tmp_path / "trace.json"
    flags = ["--trace", path, "--trace-first-step", 3, "--trace-num-steps", 2]
    done = runs.train(programs, corpus, tmp_path / "run", *flags, "--ep-num-chunks", 2)
    runs.check(done)
    assert "hidden communication / communication:" in done.output
    events = json.loads(path.read_text())["traceEvents"]
    transfers = [event["name"] for event in events if event["ph"] == "X" and event["tid"] == 1]
    # For each of 2 ranks, 2 steps and 2 chunks: forward and backward of every layer.
    assert transfers.count("dispatch") == transfers.count("combine") > 0
    assert transfers.count("dispatch") % (2 * 2 * 2 * 2) == 0


def test_a_timeline_of_another_dispatcher_is_refused(programs, corpus, tmp_path):
    flags = ["--trace", tmp_path / "t.json", "--moe-token-dispatcher-type", "alltoall"]
    done = runs.train(programs, corpus, tmp_path / "run", *flags)
    assert done.returncode != 0
    assert "logging.trace needs moe.moe_token_dispatcher_type = deepep" in done.output


def test_hidden_fraction_of_transfers():
    transfer, experts = Span(TRANSFERS, "dispatch", 0, 10), Span(EXPERTS, "forward", 4, 20)
    assert trace.hidden_fraction([transfer, experts]) == 0.6
    twice = [transfer, Span(TRANSFERS, "combine", 5, 20), experts, Span(EXPERTS, "forward", 6, 30)]
    assert trace.hidden_fraction(twice) == 0.8
    assert trace.hidden_fraction([transfer]) == 0
    assert trace.hidden_fraction([experts]) is None
