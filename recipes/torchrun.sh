#!/usr/bin/env bash
# Starts a recipe on several nodes with torchrun; run it on every node.
#
#   [RECIPE=qwen3_30b_a3b] [NODES=2] [GPUS=8] [MAX_RESTARTS=0] torchrun.sh FIRST_NODE [options of `lightning-ep fit`]
#
# RECIPE is a file or a name of `lightning-ep recipes`. FIRST_NODE is the name or address of one of the nodes, the same
# for all. Started again on all nodes it goes on from the newest checkpoint. See docs/operate/multinode.md.
set -euo pipefail
first_node="${1:?usage: torchrun.sh FIRST_NODE [options]}"
shift
nodes="${NODES:-2}" gpus="${GPUS:-8}"

# With MAX_RESTARTS torchrun starts the processes anew when one fails. Nodes then count restarts differently and would
# read one another's old addresses from the rendezvous' store (pytorch issue 135712), unless every start gets its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Where nodes have several networks, name the interface by which they reach one another. gloo carries checkpoints and
# signals on GPUs too; NCCL finds InfiniBand by itself and starts up over this one.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

exec torchrun --nnodes="$nodes" --nproc-per-node="$gpus" --max-restarts="${MAX_RESTARTS:-0}" \
    --rdzv-id=lightning-ep --rdzv-backend=c10d --rdzv-endpoint="$first_node:29500" \
    -m lightning_ep fit --config "${RECIPE:-qwen3_30b_a3b}" \
    --trainer.num_nodes "$nodes" --trainer.devices "$gpus" \
    --ckpt_path last "$@"
