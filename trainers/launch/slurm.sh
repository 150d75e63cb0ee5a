#!/usr/bin/env bash
# Several machines under Slurm, one process for each GPU; before its time is over a run saves, and is queued again. Not
# with --overwrite true, which would start again each time.
#
# Command:  PATH=$PWD/.venv/bin:$PATH sbatch trainers/launch/slurm.sh -m trainers.finetune --recipe deit --dataset ... --output_dir ...
# Without Slurm, the line of torchrun on every machine, with the first one's name as the rendezvous.
#SBATCH --job-name=vit-custom
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# The same command goes on from the checkpoint that the signal makes.
trap 'kill -TERM "$step"; wait "$step" || true; scontrol requeue "$SLURM_JOB_ID"; exit 0' TERM

# As long as the notice above; by default it is half a minute.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150

# Slurm does not hand this on to its steps by itself.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" torchrun \
  --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:29500" \
  "$@" &
step=$!
wait "$step"
