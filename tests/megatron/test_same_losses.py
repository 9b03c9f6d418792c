"""The quickstart model learns the same under deepep as under alltoall: equal in every bit."""

import training_runs as runs

FLAGS = ["--train-iters", 50, "--micro-batch-size", 4, "--no-save-at-end"]


def test_fifty_steps_give_the_losses_of_alltoall(programs, corpus, tmp_path):
    curves = {}
    for dispatcher in ("alltoall", "deepep"):
        output = tmp_path / dispatcher
        flags = [*FLAGS, "--moe-token-dispatcher-type", dispatcher]
        done = runs.train(programs, corpus, output, *flags, is_small=False)
        assert f"dispatcher {dispatcher}" in runs.check(done).output
        curves[dispatcher] = runs.numbers(output)
    assert len(runs.losses(tmp_path / "deepep")) == 50
    assert runs.losses(tmp_path / "deepep")[-1] < 0.6 * runs.losses(tmp_path / "deepep")[0]
    assert curves["deepep"] == curves["alltoall"]
