# How the SLURM scripts start: what torch.distributed wants to know under srun, then one process per GPU. A job that was
# told to stop (time limit, preemption) has saved where it is; it is queued again, and goes on from there.
PYTHON="${PYTHON:-$(scripts/setup_env.sh path)/bin/python}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)" # head would break the pipe
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))" # jobs that share a node need different ones
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=1                        # decoding runs in the workers
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1        # a rank that is gone ends the others
# `srun` of recent SLURM does not take --cpus-per-task over from `sbatch`.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
MAX_RESTARTS="${MAX_RESTARTS:-10}"              # after a lost process; after a signal there is no limit

launch() { # flags of training.main, a recipe among them
    local code=0
    # A process that has saved may end before the others: it must not take them along at once.
    srun --kill-on-bad-exit=0 --wait=120 "$PYTHON" -m training.main \
        --cache-dir "$CACHE" --logs "$LOGS" "$@" || code=$?
    # 75: stopped by a signal and saved; 138: SIGUSR1 before training began; 70: a process ended or did not move.
    # (scancel ends this shell as well: a job that its owner ends stays ended.)
    if ((code == 75 || code == 138)) || { ((code == 70)) && ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); }; then
        echo "training ended with $code: queued again" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
