#!/bin/bash
# One training stage on several machines with Slurm; the folders must be on a disk that all of them share.
#   sbatch --nodes 2 slurm.sh zero3 policy policy.yaml checkpoints/policy
#SBATCH --job-name dvpo
#SBATCH --nodes 1
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --time 24:00:00
#SBATCH --signal TERM@120
#SBATCH --requeue
set -euo pipefail
strategy=${1:?ddp, zero1, zero2, zero3 or fsdp2} kind=${2:?sft, rm, gvm, dpo or policy} config=${3:?a YAML file} out=${4:?a new folder}
launchers=$(python -c 'import reproduce, pathlib; print(pathlib.Path(reproduce.__file__).parent / "launchers")')
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export strategy kind config out launchers
# The same command goes on from the last checkpoint when the job is requeued.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
  --config_file "$launchers/$strategy.yaml" \
  --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
  --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) \
  --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
  -m reproduce.cli train "$kind" --config "$config" --out "$out"'
