#!/usr/bin/env bash
# A run on SLURM, one task a GPU, which is what JAX expects there; it finds the other tasks by itself.
#
#     sbatch launch/slurm.sh --config configs/dmdr.py:me5-large --workdir /shared/runs/me5 --config.data.root=/shared/miracl
#
# Submit from the project's directory, which all nodes see as they see --workdir. Change the figures below or override them,
# as in `sbatch --nodes=2 launch/slurm.sh ...`. Before the time is up every task gets SIGTERM: training saves a checkpoint,
# the run ends with code 143, and the job goes back into the queue, where the same command goes on.
#SBATCH --job-name=jdmdr
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

srun --kill-on-bad-exit=1 --wait=120 .venv/bin/python -m "${STAGE:-jdmdr.pipeline}" "$@"
code=$?
[ "$code" != 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
