#!/usr/bin/env bash
# Checks a training run, then submits it to SLURM. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/slurm/submit.sh [OPTIONS] CONFIG [-- FLAGS_OF_PRETRAIN]

Submits scripts/slurm/pretrain.sbatch with the nodes and GPUs that section launch of CONFIG asks for,
after checking what would otherwise fail on the cluster hours later: the configuration against the
number of ranks, the data, the directory of checkpoints, the partition with its nodes and GPUs, and
the virtual environment or container.

  --partition NAME   partition (default: that of the cluster)
  --account NAME     account to charge
  --time LIMIT       time limit of an attempt, in the words of sbatch
  --nodes N          in place of launch.num_nodes
  --network TYPE     ib (default), roce, efa or tcp: what connects the nodes
  --interface NAME   network interface for set-up traffic, such as eth0
  --venv DIR         virtual environment (default: .venv of the checkout); none takes python from PATH
  --container IMAGE  image for srun --container-image, in place of the virtual environment; where
                     python3 here lacks the packages, a short job checks in the container
  --sbatch OPTION    a further option for sbatch; may be repeated
  --dry-run          check and print the command, submit nothing
  --help             this text

Examples:
  scripts/slurm/submit.sh --dry-run configs/qwen3_30b_a3b.yaml
  scripts/slurm/submit.sh --network tcp configs/small_2x2.yaml -- --train-iters 100
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
network=ib interface="" venv=$root/.venv container="" partition=""
dry_run=no config=""
sbatch_options=() check_options=() flags=() problems=()

die() {
  printf 'submit.sh: %s\n' "$*" >&2
  exit 2
}

parse_options() {
  while [ $# -gt 0 ]; do
    case $1 in
      --partition | --account | --time | --nodes | --network | --interface | --venv | --container | --sbatch)
        [ $# -gt 1 ] || die "$1 needs a value (see --help)"
        take_value "$1" "$2"
        shift
        ;;
      --dry-run) dry_run=yes ;;
      -h | --help)
        usage
        exit 0
        ;;
      --)
        shift
        flags+=("$@")
        break
        ;;
      -*) die "unknown option $1 (see --help); flags of pretrain come after --" ;;
      *)
        [ -z "$config" ] || die "one configuration at a time, got $config and $1"
        config=$1
        ;;
    esac
    shift
  done
  [ -n "$config" ] || die "no configuration given (see --help)"
}

take_value() {
  case $1 in
    --partition)
      partition=$2
      sbatch_options+=("--partition=$2")
      check_options+=("--partition=$2")
      ;;
    --account)
      sbatch_options+=("$1=$2")
      check_options+=("$1=$2")
      ;;
    --time) sbatch_options+=("$1=$2") ;;
    --nodes) flags+=(--num-nodes "$2") ;;
    --network) network=$2 ;;
    --interface) interface=$2 ;;
    --venv) venv=$2 ;;
    --container) container=$2 ;;
    --sbatch) sbatch_options+=("$2") ;;
  esac
}

problem() { problems+=("$*"); }

# The checks run with the python of the run where that is here, else with the one on PATH.
choose_python() {
  python=python3
  if [ -n "$container" ]; then
    # A path is a file; a name with a registry is left to the cluster.
    case $container in
      /* | ./*) [ -e "$container" ] || problem "--container $container: no such file" ;;
    esac
  elif [ "$venv" != none ]; then
    python=$venv/bin/python
    [ -x "$python" ] ||
      problem "--venv $venv: no virtual environment; sbatch scripts/slurm/build.sbatch makes one"
  else
    command -v python3 >/dev/null || problem "--venv none: no python3 on PATH"
  fi
}

has_packages() {
  "$python" -c 'import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("torch", "megatron", "pydantic", "yaml"))))' 2>/dev/null
}

# megatron_ep.check; in the container, on a node, where only that has the packages.
run_check() {
  local words=(-m megatron_ep.check --shell --config "$config" "${flags[@]}")
  if [ -z "$container" ] || has_packages; then
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" "${words[@]}"
    return
  fi
  PYTHONPATH=$root srun --nodes=1 --ntasks=1 --time=10 "${check_options[@]}" \
    --container-image="$container" --container-workdir="$PWD" \
    --container-mounts="$root:$root,$PWD:$PWD${EP_MOUNTS:+,$EP_MOUNTS}" python "${words[@]}"
}

# What megatron_ep.check --shell assigns.
num_nodes="" ranks_per_node="" uses_gpus=yes train_iters="" saved_iteration=""

check_config() {
  local assignments messages
  messages=$(mktemp)
  if assignments=$(run_check 2>"$messages"); then
    eval "$assignments"
  else
    while IFS= read -r line; do problem "$line"; done <"$messages"
  fi
  rm -f "$messages"
}

check_cluster() {
  local name rows nodes gpus row_nodes row_gres state usable=0 with_gpus=0
  if ! command -v sbatch >/dev/null || ! command -v sinfo >/dev/null; then
    problem "sbatch and sinfo are not on PATH: not a login node of a SLURM cluster"
    return
  fi
  if ! rows=$(sinfo --noheader --format='%P|%D|%G|%t' 2>&1); then
    problem "sinfo: $rows"
    return
  fi
  name=${partition:-$(sed -n 's/^\([^|]*\)\*|.*/\1/p' <<<"$rows" | head -n 1)}
  if ! grep -q "^$name\*\?|" <<<"$rows"; then
    problem "--partition ${name:-(no default)}: the partitions are $(cut -d'|' -f1 <<<"$rows" |
      tr -d '*' | sort -u | xargs)"
    return
  fi
  while IFS='|' read -r _ row_nodes row_gres state; do
    case $state in down* | drain* | drng* | fail* | unk* | maint*) continue ;; esac
    usable=$((usable + row_nodes))
    gpus=$(grep -oE 'gpu(:[^:,(]+)?:[0-9]+' <<<"$row_gres" | grep -oE '[0-9]+$' |
      awk '{ sum += $1 } END { print sum + 0 }') || gpus=0
    [ "$gpus" -lt "${ranks_per_node:-0}" ] || with_gpus=$((with_gpus + row_nodes))
  done < <(grep "^$name\*\?|" <<<"$rows")
  nodes=${num_nodes:-0}
  if [ "$usable" -lt "$nodes" ]; then
    problem "partition $name has $usable usable nodes, launch.num_nodes = $nodes"
  elif [ "$uses_gpus" = yes ] && [ "$with_gpus" -lt "$nodes" ]; then
    problem "partition $name has $with_gpus nodes with $ranks_per_node GPUs, launch.num_nodes = $nodes"
  fi
}

parse_options "$@"
case $network in
  ib | roce | efa | tcp) ;;
  *) die "--network $network: expected ib, roce, efa or tcp" ;;
esac
[ -r "$config" ] || die "$config: cannot be read"
config=$(realpath "$config")
[ -w . ] || problem "$PWD: cannot write the log here"

choose_python
if [ ${#problems[@]} = 0 ]; then
  check_config
fi
check_cluster
if [ ${#problems[@]} -gt 0 ]; then
  printf 'submit.sh: not submitted:\n' >&2
  printf '  %s\n' "${problems[@]}" >&2
  exit 2
fi

export EP_ROOT=$root EP_NETWORK=$network EP_INTERFACE=$interface EP_VENV=$venv EP_CONTAINER=$container
command=(sbatch "--nodes=$num_nodes" "${sbatch_options[@]}")
if [ "$uses_gpus" = yes ]; then
  command+=("--gpus-per-node=$ranks_per_node")
fi
script=("$root/scripts/slurm/pretrain.sbatch" "$config" "${flags[@]}")

printf '%s: step %s of %s, %s nodes x %s ranks\n' \
  "$(basename "$config")" "$saved_iteration" "$train_iters" "$num_nodes" "$ranks_per_node"
printf 'EP_ROOT=%q EP_NETWORK=%q EP_INTERFACE=%q EP_VENV=%q EP_CONTAINER=%q' \
  "$EP_ROOT" "$EP_NETWORK" "$EP_INTERFACE" "$EP_VENV" "$EP_CONTAINER"
printf ' %q' "${command[@]}" "${script[@]}"
printf '\n'
"${command[@]}" --test-only "${script[@]}" || die "not submitted: sbatch refuses it, see above"
if [ "$dry_run" = no ]; then
  exec "${command[@]}" "${script[@]}"
fi
