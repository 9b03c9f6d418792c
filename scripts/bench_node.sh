#!/usr/bin/env bash
# Builds, tests and benchmarks on the GPUs of this machine. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/bench_node.sh [--ranks N] [--minutes M] [--no-build] [--no-tests] [--help] FOLDER

Builds the core, runs the conformance suite on all GPUs (one rank on each, and two), then the
benchmarks: dispatch and combine over SMs against NCCL and the copy rates of memory and link,
low-latency calls, a MoE layer where Megatron-Core is installed. JSON lines, plots and what each step
printed go to FOLDER.

Every step has a time limit. One that fails, or for which no time is left, does not stop those after
it; the exit status is 1 then. Uses the python found on PATH. With more ranks than GPUs the ranks run
under scripts/with_mps.sh.

  --ranks N     processes (default: one per GPU, 8 on a single GPU)
  --minutes M   for everything (default 9)
  --no-build    use ep_kernels/lib as it is
  --no-tests    skip the conformance suite
  --help        this text

Environment:
  NUM_RANKS               default of --ranks
  EP_KERNELS_CUDA_ARCHS   architectures to build for (default: that of this machine)
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
num_ranks=${NUM_RANKS:-}
minutes=9
build=yes
tests=yes
folder=
failed=()

die() {
  echo "bench_node.sh: $*" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case $1 in
    --ranks | --minutes)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "$1 needs a positive number"
      if [ "$1" = --ranks ]; then num_ranks=$2; else minutes=$2; fi
      shift
      ;;
    --no-build) build=no ;;
    --no-tests) tests=no ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*) die "unknown option $1 (see --help)" ;;
    *)
      [ -z "$folder" ] || die "more than one folder: $folder, $1"
      folder=$1
      ;;
  esac
  shift
done
[ -n "$folder" ] || die "no folder for the results (see --help)"

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$root"
deadline=$((SECONDS + 60 * minutes - 10))

# NVLink multicast stays off: its groups are a resource of the whole switch, and on a shared host a
# process that ends badly can leave them taken for everybody.
export NCCL_NVLS_ENABLE=0 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1

# step NAME SECONDS COMMAND...: runs a command for so long at most; remembers when it fails.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) begin=$SECONDS status=0
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    echo "[bench_node] *** $name: NOT RUN, no time is left"
    failed+=("$name (not run)")
    return
  fi
  echo "[bench_node] $name, $limit s at most: $*"
  # NOTE: no pipe, which would wait for every process that has inherited it.
  timeout --kill-after=10 "$limit" "$@" > >(tee "$folder/$name.log") 2>&1 || status=$?
  if [ "$status" -ne 0 ]; then
    echo "[bench_node] *** $name FAILED: exit status $status after $((SECONDS - begin)) s"
    failed+=("$name")
  else
    echo "[bench_node] $name: $((SECONDS - begin)) s"
  fi
}

skip() { echo "[bench_node] *** $1: SKIPPED, $2"; }

is_importable() {
  python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' \
    "$1" 2>/dev/null
}

# conformance NAME GPUS TESTS [PREFIX...]: those tests (as of pytest -k) on that many GPUs.
# Rank r is on GPU r mod GPUS.
conformance() {
  local name=$1 gpus=${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((num_gpus - 1)))} chosen=$3
  gpus=$(cut -d , -f "1-$2" <<<"$gpus")
  shift 3
  CUDA_VISIBLE_DEVICES=$gpus step "$name" 150 "$@" \
    python -m pytest -q -p no:cacheprovider --maxfail=5 --backend cuda -k "$chosen" \
    tests/test_conformance.py
}

# The tests that have no more ranks than there are GPUs.
tests_of_one_rank_per_gpu() {
  local text=cuda
  if [ "$num_gpus" -lt 8 ]; then text+=" and not many_ranks"; fi
  if [ "$num_gpus" -lt 4 ]; then text+=" and not R4"; fi
  if [ "$num_gpus" -lt 3 ]; then text+=" and not R3 and not live_anywhere"; fi
  echo "$text"
}

# bench NAME SECONDS OPTIONS...: the benchmark of high-throughput calls.
bench() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "${mps_if_shared[@]}" python -m ep_kernels.bench --device cuda \
    --ranks "$num_ranks" --timeout $((limit - 10)) --json "$folder/$name.jsonl" "$@"
}

low_latency() {
  if is_importable ep_kernels.bench.cuda_low_latency; then
    step low_latency 90 "${mps_if_shared[@]}" python -m ep_kernels.bench.cuda_low_latency \
      --ranks "$num_ranks" --json "$folder/low_latency.jsonl"
  else
    skip low_latency "ep_kernels.bench.cuda_low_latency does not exist"
  fi
}

# A layer of Qwen3-235B-A22B's sizes, against Megatron's alltoall with each kind of experts, without
# and with overlap. Each variant holds weights and gradients: no more of them than fit a GPU of 80 GB.
moe_layer() {
  if ! is_importable megatron.core; then
    skip moe_layer "megatron-core is not installed"
    return
  fi
  local options=(--tokens 4096 --hidden 4096 --ffn-hidden 1536 --topk 8 --experts 128)
  local dispatchers=(alltoall+torch deepep+torch deepep+torch/2 deepep+torch+capacity1.5+graph/2)
  if is_importable transformer_engine.pytorch; then
    dispatchers=(alltoall+te alltoall+te+fused "${dispatchers[@]}" deepep+te)
  fi
  options+=(--device cuda --overlap --dispatchers "${dispatchers[@]}")
  step moe_layer 120 "${mps_if_shared[@]}" python -m torch.distributed.run --standalone \
    --nproc-per-node "$num_ranks" -m megatron_ep.bench "${options[@]}"
  grep '^{' "$folder/moe_layer.log" >"$folder/moe_layer.jsonl" || true
}

plots() {
  if ! is_importable matplotlib; then
    skip plots "matplotlib is not installed"
    return
  fi
  for name in throughput low_latency; do
    if [ -s "$folder/$name.jsonl" ]; then
      step "plot_$name" 30 \
        python -m ep_kernels.bench.plot "$folder/$name.jsonl" "$folder/$name.png"
    fi
  done
}

num_gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$num_gpus" -gt 0 ] || die "torch finds no CUDA device"
if [ -z "$num_ranks" ]; then
  num_ranks=$((num_gpus > 1 ? num_gpus : 8))
fi
mps_if_shared=()
if [ "$num_ranks" -gt "$num_gpus" ]; then
  mps_if_shared=(scripts/with_mps.sh)
  # By default a pool takes an eighth of its GPU, more than there is for several ranks.
  export EP_KERNELS_POOL_BYTES=$((4 << 30))
fi
nvidia-smi --query-gpu=index,name,driver_version,memory.total --format=csv |
  tee "$folder/gpus.csv" || true
echo "[bench_node] $num_ranks ranks on $num_gpus GPU(s)"

if [ "$build" = yes ]; then
  if [ -z "${EP_KERNELS_CUDA_ARCHS:-}" ]; then
    EP_KERNELS_CUDA_ARCHS=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader |
      tr -d . | sort -u | paste -sd ';')
    export EP_KERNELS_CUDA_ARCHS
  fi
  step build 120 python build_native.py
fi

if [ "$tests" = yes ]; then
  if [ "$num_gpus" -gt 1 ]; then
    conformance conformance "$num_gpus" "$(tests_of_one_rank_per_gpu)"
  else
    conformance conformance 1 cuda scripts/with_mps.sh
  fi
fi

bench throughput 150 --num-sms 4 8 12 16 24
low_latency
moe_layer
bench small_batch 40 --tokens 64 --num-sms 16 --contenders ep_kernels
bench skewed 60 --routing zipf --zipf-exponent 1.2 --num-sms 16 --contenders ep_kernels
plots
if [ "$tests" = yes ] && [ "$num_gpus" -gt 1 ]; then
  # Two ranks on each GPU: a small round on all of them, checked to the byte; the suite on two.
  step two_per_gpu 60 scripts/with_mps.sh python -m ep_kernels.bench --device cuda \
    --ranks $((2 * num_gpus)) --tokens 64 --iterations 3 --contenders ep_kernels --timeout 50
  conformance conformance_two_per_gpu 2 "cuda and (R3 or R4)" scripts/with_mps.sh
fi

echo "[bench_node] results: $folder, after $SECONDS s"
if [ ${#failed[@]} -gt 0 ]; then
  printf '[bench_node] *** FAILED: %s\n' "${failed[*]}" >&2
  exit 1
fi
