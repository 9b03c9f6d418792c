#!/usr/bin/env bash
# Looks for memory errors and races in the CUDA kernels. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/sanitize_cuda.sh [--tool TOOL ...] [--ranks N ...] [--timeout SECONDS] [--help]

Runs tests/programs/cuda_small.py, which makes a few calls of every kind, under compute-sanitizer
(part of the CUDA toolkit; $COMPUTE_SANITIZER, or the one on PATH or in $CUDA_HOME). The package must
be built for the python on PATH. The exit status is 0 if every run ended well and nothing was found.

  --tool      memcheck: accesses that are out of bounds or misaligned, calls of CUDA that fail
              racecheck: races in SHARED memory; it does not look at global memory, and so at nothing
              that goes from rank to rank
              default: both; may be repeated (initcheck and synccheck work as well)
  --ranks     ranks, all on one GPU; default: 1 and 2; may be repeated
  --timeout   of each run, in seconds; default: 900
  --help      this text

Ranks are processes of their own and take turns on the GPU: MPS is not used.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
tools=()
ranks=()
limit=900

while [ $# -gt 0 ]; do
  case $1 in
    --tool | --ranks | --timeout)
      [ $# -ge 2 ] || {
        echo "sanitize_cuda.sh: $1 needs a value" >&2
        exit 2
      }
      case $1 in
        --tool) tools+=("$2") ;;
        --ranks) ranks+=("$2") ;;
        --timeout) limit=$2 ;;
      esac
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      echo "sanitize_cuda.sh: unknown option $1 (see --help)" >&2
      exit 2
      ;;
  esac
  shift
done
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck)
[ ${#ranks[@]} -gt 0 ] || ranks=(1 2)

sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)}
[ -n "$sanitizer" ] || sanitizer=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer
[ -x "$sanitizer" ] || {
  echo "sanitize_cuda.sh: compute-sanitizer is not installed; it comes with the CUDA toolkit" >&2
  exit 1
}

unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
export OMP_NUM_THREADS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1
logs=$(mktemp -d /tmp/ep_kernels_sanitizer.XXXXXX)
trap 'rm -rf "$logs"' EXIT

# Whether the sanitizer has summed up, and found nothing.
check_logs() {
  local summaries
  summaries=$(grep -hE '(ERROR|RACECHECK) SUMMARY' "$logs"/*.log) &&
    ! grep -qvE 'SUMMARY: 0 (errors|hazards)' <<<"$summaries"
}

failed=()
for tool in "${tools[@]}"; do
  for num_ranks in "${ranks[@]}"; do
    rm -f "$logs"/*
    # NOTE: the ranks are children of what is started, and import torch before they use the GPU.
    options=(--tool "$tool" --target-processes all --launch-timeout 300)
    options+=(--error-exitcode 99 --log-file "$logs/%p.log")
    echo "[sanitize] $tool, $num_ranks ranks"
    status=0
    timeout --kill-after=10 "$limit" "$sanitizer" "${options[@]}" \
      python tests/programs/cuda_small.py "$num_ranks" || status=$?
    if [ "$status" -ne 0 ] || ! check_logs; then
      failed+=("$tool with $num_ranks ranks (status $status)")
      head -c 20000 "$logs"/*.log >&2 || true
    fi
  done
done

if [ ${#failed[@]} -gt 0 ]; then
  printf '[sanitize] FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "[sanitize] nothing found"
