#!/usr/bin/env bash
# Creates .venv with pinned packages and builds the compiled core. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/setup_env.sh [--dev] [--mpi] [--recreate] [--help]

Creates .venv in this checkout, installs the packages pinned in constraints.txt and builds the
compiled core. A second run only rebuilds what changed.

If the Python found already imports torch >= 2.6, that torch is used: .venv then sees the packages
of that environment and only what is missing is installed. Without a network, what cannot be
installed is listed and the rest is set up.

  --dev        also the tools for tests, lint and type checks
  --mpi        also mpi4py (needs an MPI, such as Debian's openmpi-bin)
  --recreate   start from an empty .venv
  --help       this text

Environment:
  PYTHON              the Python to start from (default: the first of python3, python3.13 ... 3.10
                      that has torch, else the first that works)
  EP_KERNELS_VENV     where the environment goes (default: .venv)
  PIP_*               passed on to pip, such as PIP_EXTRA_INDEX_URL for CPU-only builds of torch
  EP_KERNELS_CUDA=0   no CUDA library; see build_native.py for the other build settings
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${EP_KERNELS_VENV:-$root/.venv}
venv_python=$venv/bin/python
extras=megatron
wanted_modules="torch megatron.core pydantic yaml tqdm matplotlib tensorboard"

say() { printf '[setup] %s\n' "$*" >&2; }
warn() { printf '\n[setup] *** %s\n\n' "$*" >&2; }
die() {
  warn "$*"
  exit 1
}

parse_options() {
  while [ $# -gt 0 ]; do
    case $1 in
      --dev)
        extras+=",dev"
        wanted_modules+=" pytest mypy ruff clang_format"
        ;;
      --mpi)
        extras+=",mpi"
        wanted_modules+=" mpi4py"
        ;;
      --recreate) rm -rf "$venv" ;;
      -h | --help)
        usage
        exit 0
        ;;
      *) die "unknown option $1 (see --help)" ;;
    esac
    shift
  done
}

# Exit status 0 when "$1" runs and is new enough.
is_supported_python() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' >/dev/null 2>&1
}

# Exit status 0 when "$1" imports a usable torch.
has_torch() {
  "$1" - >/dev/null 2>&1 <<'PY'
import re, torch
major, minor = map(int, re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
raise SystemExit((major, minor) < (2, 6))
PY
}

# Prints the Python to start from.
choose_python() {
  local candidate first=""
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
    is_supported_python "$candidate" || continue
    if has_torch "$candidate"; then
      echo "$candidate"
      return
    fi
    first=${first:-$candidate}
  done
  [ -n "$first" ] || die "no Python >= 3.10 found: install one, or name it with PYTHON=/path/to/python3"
  echo "$first"
}

create_venv() {
  local base options=()
  base=$(choose_python)
  if has_torch "$base"; then
    say "using the torch that $("$base" -c 'import sys; print(sys.executable)') imports"
    options+=(--system-site-packages)
  fi
  say "creating $venv"
  # Some systems lack ensurepip; the pip that the environment sees from outside does as well.
  "$base" -m venv "${options[@]}" "$venv" >/dev/null 2>&1 ||
    "$base" -m venv --without-pip "${options[@]}" "$venv" ||
    die "could not create $venv; on Debian and Ubuntu: apt-get install python3-venv"
  if ! "$venv_python" -m pip --version >/dev/null 2>&1 && [ ${#options[@]} = 0 ]; then
    rm -rf "$venv"
    die "$base has no pip for new environments; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  if [ ${#options[@]} -gt 0 ]; then
    link_outer_environment "$base"
  fi
}

# "$1" may itself be a virtual environment, whose packages --system-site-packages does not show.
link_outer_environment() {
  local site_packages
  site_packages=$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$1" - >"$site_packages/_outer_environment.pth" <<'PY'
import site, sys
if sys.prefix != sys.base_prefix:
    print(*site.getsitepackages(), sep="\n")
PY
  has_torch "$venv_python" || die "$venv does not see the torch of $1"
}

# Prints constraints: what an outer environment brings stays, except for development tools.
effective_constraints() {
  "$venv_python" - "$root/constraints.txt" <<'PY'
import re, sys
from importlib import metadata
from pathlib import Path

TOOLS = {"clang-format", "mypy", "ninja", "pytest", "ruff", "setuptools", "megatron-core"}
for line in Path(sys.argv[1]).read_text().splitlines():
    name = re.split("==|;", line)[0].strip()
    try:
        installed = metadata.version(name) if name and not line.startswith("#") else None
    except metadata.PackageNotFoundError:
        installed = None
    if installed is None or name in TOOLS:
        print(line)
    elif name == "torch":
        print(f"torch=={installed}")
PY
}

install_packages() {
  local constraints=$venv/constraints.txt
  if compgen -G "$venv/lib/python*/site-packages/_outer_environment.pth" >/dev/null; then
    effective_constraints >"$constraints"
  else
    cp "$root/constraints.txt" "$constraints"
  fi
  say "installing packages (.[${extras}]); the first time this downloads torch, which is large"
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_RETRIES=${PIP_RETRIES:-2}
  "$venv_python" -m pip install -qq -c "$constraints" "setuptools>=70.1" ninja &&
    "$venv_python" -m pip install -qq -c "$constraints" --no-build-isolation \
      -e "${root}[${extras}]"
}

# Prints the wanted modules that cannot be found.
missing_modules() {
  # shellcheck disable=SC2086  # a list of words
  "$venv_python" - $wanted_modules <<'PY'
import importlib.util, sys
def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
print(*(name for name in sys.argv[1:] if not found(name)))
PY
}

# Makes the checkout importable when pip could not.
link_checkout() {
  local site_packages
  site_packages=$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$root" >"$site_packages/_ep_kernels_checkout.pth"
}

main() {
  parse_options "$@"
  "$venv_python" -c "" 2>/dev/null || create_venv
  local stamp_file=$venv/.installed-$extras stamp missing
  stamp=$({
    cat "$root/constraints.txt" "$root/pyproject.toml" "$root/setup.py"
    echo "$root"
    "$venv_python" --version
  } | sha256sum)
  if [ "$(cat "$stamp_file" 2>/dev/null)" != "$stamp" ]; then
    if install_packages; then
      echo "$stamp" >"$stamp_file"
    else
      warn "pip could not install everything (no network?); going on with what is there"
      link_checkout
    fi
  fi
  (cd "$root" && "$venv_python" build_native.py >"$venv/build.log" 2>&1) || {
    cat "$venv/build.log" >&2
    die "the compiled core could not be built"
  }
  missing=$(missing_modules)
  [ -z "$missing" ] || warn "NOT INSTALLED: $missing. What needs them will not run."
  case " $missing " in
    *" torch "*) die "torch is needed and could not be installed: pip install torch" ;;
  esac
  say "ready: $venv"
}

main "$@"
