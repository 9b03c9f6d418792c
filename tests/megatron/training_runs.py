"""Training runs of a small model on two ranks, and what they leave."""

from programs import ROOT

from megatron_ep.metrics import read_metrics

NUM_STEPS = 8
NUM_LAYERS = 2
NUM_EXPERTS = 8
TOPK = 2
TOKENS_PER_STEP = 2 * 2 * 32  # ranks, sequences, tokens

SMALL = f"""
--device cpu --num-layers {NUM_LAYERS} --hidden-size 32 --num-attention-heads 2
--moe-ffn-hidden-size 32 --seq-length 32 --micro-batch-size 2 --hidden-dropout 0.1
--train-iters {NUM_STEPS} --lr-warmup-iters 1 --eval-interval 4 --eval-iters 2 --no-progress-bar
""".split()
"""On top of configs/quickstart.yaml. Dropout, so that a resume must restore random states."""

TIMES = {"step_time_ms", "tokens_per_s"}


def train(programs, corpus, output, *flags, is_small=True):
    """Runs megatron_ep.pretrain to its end; see Programs.run."""
    return programs.run(*command(corpus, output, *flags, is_small=is_small), num_ranks=2)


def command(corpus, output, *flags, is_small=True):
    """The module and its arguments."""
    return [
        "megatron_ep.pretrain",
        *("--config", ROOT / "configs/quickstart.yaml"),
        *("--data-path", corpus),
        *("--save", output, "--tensorboard-dir", output / "tensorboard"),
        *(SMALL if is_small else ["--device", "cpu", "--no-progress-bar"]),
        *flags,
    ]


def check(done):
    """The run has ended well."""
    assert done.returncode == 0, done.output
    return done


def records(output, kind=None):
    """Lines of the metrics file."""
    lines = read_metrics(output / "metrics.jsonl")
    return [line for line in lines if kind in (None, line["kind"])]


def numbers(output):
    """Everything in the metrics file that does not depend on the speed, by (step, kind)."""
    return {
        (line["iteration"], line["kind"]): {k: v for k, v in line.items() if k not in TIMES}
        for line in records(output)
    }


def losses(output, kind="train"):
    return [line["loss"] for line in records(output, kind)]
