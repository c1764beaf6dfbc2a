#!/bin/sh
# sbatch examples/slurm.sh: a recipe on two machines of eight GPUs. It goes on where it stopped when Slurm starts it again.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Two minutes before the time is over every process gets SIGTERM, and the run writes a checkpoint.
set -eu
run=runs/fashion-mnist
resume=""
[ -e "$run/recipe.yaml" ] && resume=--resume
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint="$host:29500" \
    --rdzv-id="$SLURM_JOB_ID" -m -- rarefy train recipes/fashion-mnist.yaml --set schedule.batch_size=1024 \
    --run "$run" $resume
