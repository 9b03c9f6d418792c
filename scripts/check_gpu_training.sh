#!/usr/bin/env bash
# Shows on GPUs what megatron_ep does there. See --help.
set -uo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/check_gpu_training.sh [--output DIR] [--data PREFIX] [STEP ...]

Runs these steps, all of them even when one fails, and prints their numbers as they come:

  layer   the tests of the MoE layer, its chunks, recomputation, experts and CUDA graphs: deepep
          computes what alltoall does
  fp32    trains a small MoE GPT with 2 ranks under alltoall, deepep and deepep in 2 chunks, and
          compares the losses
  bf16    the same in bf16
  fp8     the same in FP8, where Transformer Engine is installed
  bench2  times one MoE layer under all dispatchers with 2 ranks, and writes its timeline
  bench4  the same with 4 ranks
  host    where the host's time goes in that layer with 4 ranks, what a chunk adds, how much is hidden;
          as it is, and with experts that take as long as the transfers
  experts the same layer with each kind of experts, with a capacity and as CUDA graphs, under deepep
          and under alltoall, in one piece and in chunks; how much is hidden, what a chunk adds

  spread  how far rounding alone moves the losses: in bf16 in 1 to 4 chunks, at the learning rate of the
          other steps and at a tenth of it; and with gradients of chunks summed in fp32
  padding in FP8, whether padding by routing is what sets alltoall and deepep apart

Without a STEP: all but spread and padding, which compare losses without a bound. The status is 0 if
every step was. Ranks that share a GPU get an MPS daemon of their own. Needs the packages of the extras
megatron and dev, and the compiled core with its CUDA part.

  --output DIR   for metrics and timelines (default: runs/check_gpu_training)
  --data PREFIX  .bin/.idx files of bytes (default: made of sources of the standard library)
  --help         this text

Environment:
  TRAIN_STEPS    100    BENCH_FLAGS   further flags of megatron_ep.bench, such as "--iterations 20"
  STEP_TIMEOUT   180    seconds for each command
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=runs/check_gpu_training
data=
steps=()
failed=()

say() { printf '\n[check] %s\n' "$*"; }
die() {
  printf '[check] *** %s\n' "$*" >&2
  exit 2
}

arguments=("$@")
while [ $# -gt 0 ]; do
  case $1 in
    --output | --data)
      [ $# -gt 1 ] || die "$1 needs a value (see --help)"
      if [ "$1" = --output ]; then output=$2; else data=$2; fi
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    layer | fp32 | bf16 | fp8 | bench2 | bench4 | host | experts | spread | padding) steps+=("$1") ;;
    *) die "unknown step or option $1 (see --help)" ;;
  esac
  shift
done
[ ${#steps[@]} -gt 0 ] || steps=(layer fp32 bf16 fp8 bench2 bench4 host experts)

num_gpus=$(python -c 'import torch; print(torch.cuda.device_count())') || die "torch cannot be imported"
[ "$num_gpus" -gt 0 ] || die "torch finds no CUDA device"
if [ "$num_gpus" -lt 4 ] && [ -z "${CUDA_MPS_PIPE_DIRECTORY:-}" ]; then
  if command -v nvidia-cuda-mps-control >/dev/null; then
    exec "$root/scripts/with_mps.sh" "$0" "${arguments[@]}"
  fi
  say "*** no MPS here: ranks that share a GPU take turns, and their times mean nothing"
fi

cd "$root" || exit
mkdir -p "$output"
# One thread per rank: several ranks share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONWARNINGS=ignore
has_te=no
if python -c 'import transformer_engine.pytorch' 2>/dev/null; then has_te=yes; fi
say "$num_gpus GPU(s), Transformer Engine: $has_te, under MPS: ${CUDA_MPS_PIPE_DIRECTORY:+yes}"

# Runs a command within its time, and remembers when it fails; "$1" names it.
run() {
  local name=$1 status=0 begin=$SECONDS
  shift
  say "$name: $*"
  timeout --kill-after=10 "${STEP_TIMEOUT:-180}" "$@" || status=$?
  [ "$status" = 0 ] || failed+=("$name (status $status)")
  say "$name: status $status after $((SECONDS - begin)) s"
  return "$status"
}

ranks() {
  local count=$1
  shift
  echo python -m torch.distributed.run --standalone --nproc-per-node "$count" -m "$@"
}

make_data() {
  [ -z "$data" ] || return 0
  data=$output/data/bytes
  [ ! -e "$data.idx" ] || return 0
  local stdlib
  stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
  run data python -m megatron_ep.preprocess --suffix .py --skip-undecodable --output "$data" \
    --input "$stdlib"/{asyncio,concurrent,email,json,logging,multiprocessing,unittest}
}

# Trains once; "$1" names the run, the rest are flags.
train() {
  local name=$1 folder=$output/$1
  shift
  rm -rf "$folder"
  # shellcheck disable=SC2046  # words
  run "$name" $(ranks 2 megatron_ep.pretrain) --config configs/quickstart.yaml --device cuda \
    --data-path "$data" --save "$folder" --no-save-at-end --tensorboard-dir none \
    --metrics-file "$folder/metrics.jsonl" --eval-interval none --no-progress-bar \
    --train-iters "${TRAIN_STEPS:-100}" "$@"
}

# Trains in the precision "$1" under each dispatcher; losses may differ by "$2", relatively. The rest
# are flags of all runs.
train_all() {
  local precision=$1 bound=$2
  shift 2
  make_data || return
  local names=(alltoall deepep chunks)
  train "$precision-alltoall" --moe-token-dispatcher-type alltoall "$@"
  train "$precision-deepep" "$@"
  train "$precision-chunks" --ep-num-chunks 2 "$@"
  run "$precision: losses" python -m megatron_ep.compare_losses "${names[@]/#/$output/$precision-}" \
    --within "$bound"
}

# Compares the losses of runs, without a bound; "$1" names the comparison.
compare() {
  local name=$1
  shift
  run "$name: losses" python -m megatron_ep.compare_losses "${@/#/$output/}"
}

# In one piece and in chunks; the first argument names the runs, the rest are flags of all of them.
train_in_chunks() {
  local name=$1 count names=()
  shift
  for count in 1 2 3 4; do
    train "$name-$count" --precision bf16 "${te_flags[@]}" --ep-num-chunks "$count" "$@"
    names+=("$name-$count")
  done
  compare "$name" "${names[@]}"
}

measure_spread() {
  make_data || return
  train_in_chunks spread
  train_in_chunks spread-low --lr 3e-4 --min-lr 3e-5
  [ "$has_te" = no ] || train_in_chunks spread-fused --gradient-accumulation-fusion
}

# With and without padding by Megatron's router or by dispatch; Transformer Engine pads the rest itself.
compare_padding() {
  local name fp8=(--precision bf16 "${te_flags[@]}" --fp8-format hybrid --fp8-recipe tensorwise)
  make_data || return
  for name in alltoall deepep; do
    train "padding-$name" "${fp8[@]}" --moe-token-dispatcher-type "$name"
    train "padding-$name-routed" "${fp8[@]}" --moe-token-dispatcher-type "$name" \
      --moe-router-padding-for-quantization
  done
  compare padding padding-alltoall padding-deepep padding-deepep-routed padding-alltoall-routed
}

# Runs the benchmark of the layer with "$2" ranks; "$1" names the run, the rest are flags.
bench() {
  local name=$1 count=$2 te=()
  shift 2
  [ "$has_te" = no ] || te=(--te)
  # shellcheck disable=SC2046,SC2086  # words
  run "$name" $(ranks "$count" megatron_ep.bench) --device cuda "${te[@]}" \
    --hidden 4096 --ffn-hidden 256 --experts 64 --topk 8 --tokens 2048 "$@" ${BENCH_FLAGS:-}
}

compare_dispatchers() {
  bench "bench$1" "$1" --dispatchers alltoall allgather deepep deepep/2 deepep/4 deepep/8 \
    --trace "$output/bench$1.json"
}

look_at_host() {
  local flags=(--profile --overlap --dispatchers deepep deepep/2 deepep/4 deepep/auto deepep+fp8)
  bench host 4 --warmup 7 "${flags[@]}"
  bench host-balanced 4 --warmup 7 --balance --tokens 8192 "${flags[@]}"
}

# All are in bf16, which torch's grouped GEMM takes.
compare_experts() {
  local one=deepep+torch ours dispatchers=(alltoall+torch) capacity=+capacity1.5
  [ "$has_te" = no ] || dispatchers+=(alltoall+te alltoall+te+fused deepep+te deepep+te/2 deepep+te/4)
  for ours in $one $one$capacity; do dispatchers+=("$ours" "$ours/2" "$ours/4"); done
  dispatchers+=("$one$capacity+graph" "$one$capacity+graph/2")
  bench experts 4 --profile --overlap --dispatchers "${dispatchers[@]}" "$one$capacity+graph/4"
  bench experts-balanced 4 --balance --tokens 8192 --profile --overlap \
    --dispatchers "${dispatchers[@]}"
}

te_flags=()
[ "$has_te" = no ] || te_flags=(--transformer-impl transformer_engine --moe-grouped-gemm)

for step in "${steps[@]}"; do
  case $step in
    layer)
      run layer python -m pytest -q -p no:cacheprovider tests/megatron/test_moe_layer.py \
        tests/megatron/test_overlap.py tests/megatron/test_trace.py \
        tests/megatron/test_recompute.py tests/megatron/test_experts.py -k "cuda and not tp2 and not tp4"
      ;;
    fp32) train_all fp32 1e-3 --transformer-impl local ;;
    bf16) train_all bf16 0.1 --precision bf16 "${te_flags[@]}" ;;
    fp8)
      if [ "$has_te" = yes ]; then
        train_all fp8 0.1 --precision bf16 "${te_flags[@]}" --fp8-format hybrid \
          --fp8-recipe tensorwise --moe-router-padding-for-quantization
      else
        say "fp8: left out, since Transformer Engine cannot be imported"
      fi
      ;;
    bench2) compare_dispatchers 2 ;;
    bench4) compare_dispatchers 4 ;;
    host) look_at_host ;;
    experts) compare_experts ;;
    spread) measure_spread ;;
    padding)
      if [ "$has_te" = yes ]; then
        compare_padding
      else
        say "padding: left out, since Transformer Engine cannot be imported"
      fi
      ;;
  esac
done

if [ ${#failed[@]} -gt 0 ]; then
  say "FAILED: ${failed[*]}"
  exit 1
fi
say "all done in $SECONDS s"
