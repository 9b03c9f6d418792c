#!/usr/bin/env bash
# Trains a tiny model with an unmodified checkout of Megatron-LM on 2 CPU ranks, once for each token
# dispatcher, and compares the losses.
#
# usage: scripts/check_megatron_lm.sh CHECKOUT [TRAIN_ITERS]
#
# CHECKOUT  a work tree of NVIDIA/Megatron-LM, tag core_v0.16.1 or main (which needs Python 3.12);
#           it is left as it is. Megatron-LM wants the package six besides ours.
set -euo pipefail

if [[ $# -lt 1 || "$1" == "-h" || "$1" == "--help" ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  [[ "${1:-}" == -* ]] && exit 0 || exit 2
fi

checkout=$(realpath "$1")
iterations=${2:-40}
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cd "$folder"

# Writes the losses of a run to the file $1; the other arguments choose the dispatcher.
train() {
  local losses=$1
  shift
  python -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_ep.launch \
    "$checkout/pretrain_gpt.py" --distributed-backend gloo --transformer-impl local \
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 \
    --seq-length 32 --max-position-embeddings 32 --disable-bias-linear \
    --num-experts 4 --moe-router-topk 2 --moe-router-dtype fp32 --expert-model-parallel-size 2 \
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 \
    --micro-batch-size 2 --global-batch-size 4 --train-iters "$iterations" --lr 1e-3 \
    --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion \
    --log-interval 1 --eval-interval 100000 --eval-iters 0 "$@" > log 2>&1 ||
    { tail -40 log >&2; exit 1; }
  grep -o 'lm loss: [0-9.E+-]*' log > "$losses"
  echo "$losses: $(wc -l < "$losses") steps, last $(tail -n 1 "$losses")"
}

train alltoall --moe-token-dispatcher-type alltoall
train deepep --moe-token-dispatcher-type deepep
train flex --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep
cmp alltoall deepep
cmp alltoall flex
echo "the losses are equal"
