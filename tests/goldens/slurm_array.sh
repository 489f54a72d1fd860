#!/bin/bash

# Parameters
#SBATCH --account=physics
#SBATCH --array=0-1%2
#SBATCH --cpus-per-task=1
#SBATCH --error=LOGS/%A_%a/%A_%a_0_log.err
#SBATCH --job-name=kelib
#SBATCH --mem=3GB
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=LOGS/%A_%a/%A_%a_0_log.out
#SBATCH --partition=short
#SBATCH --signal=USR2@20
#SBATCH --time=5
#SBATCH --wckey=submitit

# setup
module load python

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output LOGS/%A_%a/%A_%a_%t_log.out --error LOGS/%A_%a/%A_%a_%t_log.err PYTHON -u -m submitit.core._submit LOGS/%j
