#!/usr/bin/env bash
# Runs a command under a CUDA MPS daemon of its own, so that several rank processes can run their
# kernels on one GPU at the same time, and stops the daemon afterwards.
#
#   scripts/with_mps.sh COMMAND [ARG ...]
#
# Without MPS processes take turns on the GPU: results are right, timings mean nothing.
set -euo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  exit 0
fi
command -v nvidia-cuda-mps-control >/dev/null || {
  echo "with_mps.sh: nvidia-cuda-mps-control is not installed; it comes with the NVIDIA driver" >&2
  exit 1
}

dir=$(mktemp -d /tmp/ep_kernels_mps.XXXXXX)
export CUDA_MPS_PIPE_DIRECTORY=$dir CUDA_MPS_LOG_DIRECTORY=$dir
stop() {
  echo quit | timeout 20 nvidia-cuda-mps-control >/dev/null 2>&1 || true
  rm -rf "$dir"
}
trap stop EXIT
nvidia-cuda-mps-control -d
status=0
"$@" || status=$?
exit "$status"
