#!/usr/bin/env bash
# Sets up the environment and runs the tests. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/test.sh [SUBSET] [--mpi] [--no-setup] [--help] [-- PYTEST_ARGUMENTS]

Sets up .venv (scripts/setup_env.sh --dev), builds, and runs the tests.

SUBSET
  all         everything (default)
  kernels     ep_kernels only
  megatron    megatron_ep only: the plug-in for Megatron-Core and the training entry

  --mpi       also install mpi4py, so that the tests with MPI communicators run
  --no-setup  use the python found on PATH as it is (the core must be built)
  --help      this text

Examples:
  scripts/test.sh kernels -- -x -k "combine and not fp8"
  scripts/test.sh -- --durations=20
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
subset=all
setup=yes
setup_options=(--dev)
pytest_options=()

while [ $# -gt 0 ]; do
  case $1 in
    all | kernels | megatron) subset=$1 ;;
    --mpi) setup_options+=(--mpi) ;;
    --no-setup) setup=no ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      pytest_options+=("$@")
      break
      ;;
    *)
      echo "test.sh: unknown option $1 (see --help); options for pytest come after --" >&2
      exit 2
      ;;
  esac
  shift
done

if [ "$setup" = yes ]; then
  scripts/setup_env.sh "${setup_options[@]}"
  PATH=${EP_KERNELS_VENV:-$root/.venv}/bin:$PATH
fi

case $subset in
  kernels) pytest_options=(tests --ignore=tests/megatron "${pytest_options[@]}") ;;
  megatron) pytest_options=(tests/megatron "${pytest_options[@]}") ;;
esac

# One thread per rank: several ranks share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest "${pytest_options[@]}"
