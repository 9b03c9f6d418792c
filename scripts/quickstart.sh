#!/usr/bin/env bash
# Trains a small MoE GPT on CPU ranks, from a fresh clone. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/quickstart.sh [OPTIONS] [-- FLAGS_OF_PRETRAIN]

Sets up .venv (scripts/setup_env.sh), makes a data set of the Python standard library's own sources,
trains a small MoE GPT on it on 2 CPU ranks whose tokens ep_kernels moves between the experts, and
writes a plot of the loss and a sample of generated text.

  --output DIR       where everything goes (default: runs/quickstart); a run that is there is replaced
  --steps N          training steps (default: those of configs/quickstart.yaml)
  --ranks N          processes (default: 2)
  --dispatcher TYPE  deepep (default), alltoall, allgather: who moves the tokens
  --no-setup         use the python found on PATH as it is
  --help             this text

Example: scripts/quickstart.sh --steps 100 -- --moe-router-topk 4 --lr 5e-4
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=runs/quickstart
num_ranks=2
dispatcher=deepep
setup=yes
train_flags=()

say() { printf '\n[quickstart] %s\n' "$*"; }
die() {
  printf '\n[quickstart] *** %s\n' "$*" >&2
  exit 1
}

while [ $# -gt 0 ]; do
  case $1 in
    --output | --steps | --ranks | --dispatcher)
      [ $# -gt 1 ] || die "$1 needs a value (see --help)"
      case $1 in
        --output) output=$2 ;;
        --steps)
          [[ $2 =~ ^[1-9][0-9]*$ ]] || die "--steps $2 is not a positive number"
          train_flags+=(--train-iters "$2" --lr-warmup-iters $(($2 / 10)))
          ;;
        --ranks) num_ranks=$2 ;;
        --dispatcher) dispatcher=$2 ;;
      esac
      shift
      ;;
    --no-setup) setup=no ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      train_flags+=("$@")
      break
      ;;
    *) die "unknown option $1 (see --help)" ;;
  esac
  shift
done

if [ "$setup" = yes ]; then
  "$root/scripts/setup_env.sh"
  PATH=${EP_KERNELS_VENV:-$root/.venv}/bin:$PATH
fi
mkdir -p "$output"
output=$(cd "$output" && pwd)
cd "$root"
python - <<'PY' || die "training needs these packages; connect to a network once, or install them"
import importlib.util, sys
missing = [n for n in ("megatron", "pydantic", "yaml", "tqdm") if not importlib.util.find_spec(n)]
print("not installed:", *missing, file=sys.stderr) if missing else None
sys.exit(bool(missing))
PY

# The standard library without its tests and without installed packages.
stdlib_sources() {
  python - <<'PY'
import sysconfig
from pathlib import Path
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
stdlib = Path(sysconfig.get_path("stdlib"))
for path in sorted(stdlib.rglob("*.py")):
    if not LEFT_OUT & set(path.relative_to(stdlib).parts):
        print(path)
PY
}

data=$output/data/stdlib
if [ ! -e "$data.idx" ]; then
  say "data: the sources of the Python standard library"
  mapfile -t sources < <(stdlib_sources)
  [ ${#sources[@]} -gt 0 ] || die "this Python comes without the sources of its standard library"
  python -m megatron_ep.preprocess --input "${sources[@]}" --output "$data" --skip-undecodable
fi

say "training on $num_ranks CPU ranks, moe-token-dispatcher-type $dispatcher"
rm -rf "$output/checkpoints" "$output/tensorboard" "$output/metrics.jsonl"
# One thread per rank unless told otherwise: the ranks share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m torch.distributed.run --standalone --nproc-per-node "$num_ranks" \
  -m megatron_ep.pretrain --config configs/quickstart.yaml \
  --data-path "$data" \
  --save "$output/checkpoints" \
  --metrics-file "$output/metrics.jsonl" \
  --tensorboard-dir "$output/tensorboard" \
  --moe-token-dispatcher-type "$dispatcher" \
  "${train_flags[@]}"

say "plot and sample"
python -m megatron_ep.plot "$output/metrics.jsonl" --output "$output/loss.png" ||
  printf '[quickstart] *** no plot: see above\n' >&2
python -m megatron_ep.generate --load "$output/checkpoints" --prompt "def " >"$output/sample.txt"
cat "$output/sample.txt"

python - "$output/metrics.jsonl" <<'PY' || die "the loss did not fall: see $output/metrics.jsonl"
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
losses = [line["loss"] for line in lines if line["kind"] == "train"]
tenth = max(1, len(losses) // 10)
first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
print(f"\nloss: {first:.3f} at the start, {last:.3f} at the end, over {len(losses)} reports")
sys.exit(not last < first)
PY

say "done in $SECONDS s
  loss plot      $output/loss.png
  sample         $output/sample.txt
  metrics        $output/metrics.jsonl
  checkpoint     $output/checkpoints
  TensorBoard    tensorboard --logdir $output/tensorboard"
