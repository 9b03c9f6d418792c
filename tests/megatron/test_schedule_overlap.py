"""Megatron's schedule that overlaps transfers with other micro batches computes the same.

Weights of embedding and output are apart: the schedule would add up both gradients of tied ones in
fp32, autograd in bf16.
"""

import training_runs as runs

COMMON = [
    *("--bf16", "--global-batch-size", 16, "--num-layers", 4, "--train-iters", 3),
    *("--eval-interval", 3, "--no-save-at-end", "--untie-embeddings-and-output-weights"),
]
OVERLAP = ["--overlap-moe-expert-parallel-comm"]
PIPELINE = [
    *("--pipeline-model-parallel-size", 2, "--virtual-pipeline-model-parallel-size", 2),
    *("--mtp-num-layers", 1),
]
SETTINGS = {
    "one stage": ["--use-distributed-optimizer", "--overlap-grad-reduce"],
    "interleaved stages": PIPELINE,
}


def test_a_training_with_overlapping_micro_batches_has_the_same_losses(train_on_ranks, tmp_path):
    cases = {name: COMMON + flags for name, flags in SETTINGS.items()}
    cases |= {f"{name} overlapping": flags + OVERLAP for name, flags in cases.items()}
    for status, printed in train_on_ranks(4, cases).values():
        assert status == 0, printed
    for name in SETTINGS:
        assert runs.numbers(tmp_path / f"{name} overlapping") == runs.numbers(tmp_path / name)
