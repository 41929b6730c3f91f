# Sourced by the SLURM scripts: sets the environment of torch.distributed and starts one process per GPU with srun. If a
# job is told to stop (time limit, preemption), it saves its state, is requeued, and continues from there.
PYTHON="${PYTHON:-$(scripts/setup_env.sh path)/bin/python}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)" # head would break the pipe
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))" # jobs that share a node need different ports
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=1                        # decoding runs in the workers
# Batches of captions differ in length, so memory fragments. The second name is that of older versions of PyTorch.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
export PYTORCH_CUDA_ALLOC_CONF="$PYTORCH_ALLOC_CONF"
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1        # if a rank is lost, the other ranks end
# `srun` of recent SLURM doesn't inherit --cpus-per-task from `sbatch`.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
MAX_RESTARTS="${MAX_RESTARTS:-10}"              # after a lost process; restarts after a signal are not limited

launch() { # arguments: flags of training.main, including a recipe
    local code=0
    # A process that has saved may end before the others; srun must not kill them immediately.
    srun --kill-on-bad-exit=0 --wait=120 "$PYTHON" -m training.main \
        --cache-dir "$CACHE" --logs "$LOGS" "$@" || code=$?
    # 75: stopped by a signal and saved; 138: SIGUSR1 before training began; 70: a process ended or hung; above 128: the
    # process that ended was killed by a signal, which srun returns instead of the others' 70; 130: Ctrl-C.
    # (scancel ends this shell as well, so a job that its owner cancels is not requeued.)
    local lost=$((code == 70 || code > 128 && code != 130))
    if ((code == 75 || code == 138)) || ((lost && ${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
        echo "training ended with exit code $code: requeued" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
