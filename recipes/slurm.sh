#!/bin/bash
# Starts a recipe on several nodes with SLURM.
#
#   [RECIPE=qwen3_30b_a3b] sbatch slurm.sh [options of `lightning-ep fit`]
#
# RECIPE is a file or a name of `lightning-ep recipes`. One task per GPU. Started again (requeued, or by hand) it goes on
# from the newest checkpoint. See docs/operate/multinode.md.

# (Lightning takes jobs named "bash" or "interactive" for terminals and ignores SLURM.)
#SBATCH --job-name=lightning-ep
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
# Every task must see all GPUs of its node, and picks its own: no --gpus-per-task, no --gpu-bind.
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
# 300 s before the end the tasks get SIGUSR1: they finish their step, save, and requeue the job. Not "B:": it is for the
# tasks, not for this script.
#SBATCH --signal=SIGUSR1@300
# After the failure of a node SLURM requeues the job by itself.
#SBATCH --requeue
set -euo pipefail

# source .venv/bin/activate
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun no longer takes it from sbatch
export NCCL_DEBUG=WARN
# Where nodes have several networks, name the interface by which they reach one another. gloo carries checkpoints and
# signals on GPUs too; NCCL finds InfiniBand by itself and starts up over this one.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# --kill-on-bad-exit: one failed task ends all. --distribution=block: ranks node by node, EP groups inside nodes.
exec srun --kill-on-bad-exit=1 --distribution=block python -m lightning_ep fit \
    --config "${RECIPE:-qwen3_30b_a3b}" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
    --ckpt_path last "$@"
