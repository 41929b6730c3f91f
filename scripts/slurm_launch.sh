# How the SLURM scripts start: what torch.distributed wants to know under srun, then one process per GPU.
PYTHON="${PYTHON:-$(scripts/setup_env.sh path)/bin/python}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)" # head would break the pipe
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))" # jobs that share a node need different ones
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=1                        # decoding runs in the workers
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1        # a rank that is gone ends the others
# `srun` of recent SLURM does not take --cpus-per-task over from `sbatch`.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

launch() { # flags of training.main: what belongs to the scale
    source scripts/recipe.sh
    exec srun --kill-on-bad-exit=1 "$PYTHON" -m training.main "${RECIPE[@]}" \
        --cache-dir "$CACHE" --logs "$LOGS" --batch-size 512 --epochs 10 "$@"
}
