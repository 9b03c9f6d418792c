#!/usr/bin/env bash
# Format, lint and type checks. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/lint.sh [--fix] [--no-setup] [--help]

Runs ruff, clang-format, mypy and shellcheck over the tree, all of them even when one fails.
shellcheck is skipped where it is not installed.

  --fix       let ruff and clang-format rewrite the files first
  --no-setup  use the tools found on PATH instead of those of .venv
  --help      this text
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
fix=no
setup=yes
failed=()

for option in "$@"; do
  case $option in
    --fix) fix=yes ;;
    --no-setup) setup=no ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      echo "lint.sh: unknown option $option (see --help)" >&2
      exit 2
      ;;
  esac
done

if [ "$setup" = yes ]; then
  scripts/setup_env.sh --dev
  PATH=${EP_KERNELS_VENV:-$root/.venv}/bin:$PATH
fi

# Runs a check, and remembers when it fails.
check() {
  printf '[lint] %s\n' "$*" | cut -c1-100
  "$@" || failed+=("$1 ${2:-}")
}

mapfile -t cpp_files < <(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
mapfile -t shell_files < <(git ls-files '*.sh' '*.sbatch' .ci/run)

if [ "$fix" = yes ]; then
  python -m ruff check --fix --quiet . || true
  python -m ruff format --quiet .
  clang-format -i "${cpp_files[@]}"
fi

check python -m ruff check .
check python -m ruff format --check .
if [ ${#cpp_files[@]} -gt 0 ]; then
  check clang-format --dry-run -Werror "${cpp_files[@]}"
fi
check python -m mypy
if command -v shellcheck >/dev/null; then
  check shellcheck "${shell_files[@]}"
else
  printf '\n[lint] *** SKIPPED shellcheck: not installed\n\n' >&2
fi

if [ ${#failed[@]} -gt 0 ]; then
  printf '[lint] FAILED: %s\n' "${failed[*]}" >&2
  exit 1
fi
echo "[lint] all clean"
