# shellcheck shell=bash
# Sourced by the batch scripts: the network, the software, and how ranks are started on all nodes.
#
#   EP_NETWORK    ib, roce, efa or tcp: what connects the nodes
#   EP_INTERFACE  network interface for set-up traffic (default: what the libraries choose)
#   EP_ROOT       the checkout, on a file system that all nodes share
#   EP_VENV       its virtual environment (default: $EP_ROOT/.venv); "none" takes python from PATH
#   EP_CONTAINER  image for srun --container-image (pyxis) in place of EP_VENV
#   EP_MOUNTS     further container mounts, FROM:TO,...

# ---- Network -------------------------------------------------------------------------------------
# The block to adapt to a cluster. Each setting gives way to one that is in the environment already.
set_default() { [ -n "${!1+set}" ] || export "$1=$2"; }

case $EP_NETWORK in
  ib) # InfiniBand: the fabric routes by itself, only the adapters have to be named
    set_default NCCL_IB_HCA mlx5
    set_default NVSHMEM_REMOTE_TRANSPORT ibrc
    ;;
  roce) # RDMA over Ethernet: addresses (RoCE v2 has index 3 as a rule) and the lossless class
    set_default NCCL_IB_HCA mlx5
    set_default NCCL_IB_GID_INDEX 3
    set_default NCCL_IB_TC 106
    set_default NVSHMEM_REMOTE_TRANSPORT ibrc
    set_default NVSHMEM_IB_GID_INDEX 3
    set_default NVSHMEM_IB_TRAFFIC_CLASS 106
    ;;
  efa) # AWS: through libfabric; NCCL finds the plugin of aws-ofi-nccl on LD_LIBRARY_PATH
    set_default FI_PROVIDER efa
    set_default FI_EFA_USE_DEVICE_RDMA 1
    set_default FI_EFA_FORK_SAFE 1
    set_default NVSHMEM_REMOTE_TRANSPORT libfabric
    set_default NVSHMEM_LIBFABRIC_PROVIDER efa
    ;;
  tcp) # plain Ethernet, and CPU ranks
    set_default NCCL_IB_DISABLE 1
    set_default NCCL_NET Socket
    ;;
  *)
    echo "EP_NETWORK=$EP_NETWORK: expected ib, roce, efa or tcp" >&2
    exit 2
    ;;
esac

if [ -n "${EP_INTERFACE:-}" ]; then
  set_default GLOO_SOCKET_IFNAME "$EP_INTERFACE"
  set_default NCCL_SOCKET_IFNAME "$EP_INTERFACE"
  set_default NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME "$EP_INTERFACE"
fi

# ---- Software ------------------------------------------------------------------------------------
container_options=()
if [ -n "${EP_CONTAINER:-}" ]; then
  mounts=$EP_ROOT:$EP_ROOT,$PWD:$PWD${EP_MOUNTS:+,$EP_MOUNTS}
  container_options=(
    --container-image="$EP_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD"
  )
elif [ "${EP_VENV:=$EP_ROOT/.venv}" != none ]; then
  PATH=$EP_VENV/bin:$PATH
fi
export PYTHONPATH=$EP_ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
set_default OMP_NUM_THREADS 1

log() { printf '[job %s, attempt %s] %s\n' "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$*"; }

# One task on every node, with all its cores: without this a task has one core.
run_on_all_nodes() {
  srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --kill-on-bad-exit=1 \
    "${container_options[@]}" "$@"
}

# A command on the first node, in the container where there is one.
run_once() {
  if [ ${#container_options[@]} -gt 0 ]; then
    srun --nodes=1 --ntasks=1 --overlap "${container_options[@]}" "$@"
  else
    "$@"
  fi
}

# Starts "$1" ranks on every node, each of which runs python with the other arguments.
run_ranks() {
  local ranks_per_node=$1 head
  shift
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # The port changes with each attempt: a process that dies slowly may still hold the last one.
  export EP_RANKS_PER_NODE=$ranks_per_node EP_MASTER_ADDR=$head
  export EP_MASTER_PORT=$((20000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0} % 10) % 20000))
  # USR1 is for the ranks: torchrun, which passes nothing on, ignores it as its shell does.
  # shellcheck disable=SC2016  # for the shell of each node
  run_on_all_nodes bash -c 'trap "" USR1; exec python -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$EP_RANKS_PER_NODE" \
    --master-addr="$EP_MASTER_ADDR" --master-port="$EP_MASTER_PORT" "$@"' torchrun "$@"
}
