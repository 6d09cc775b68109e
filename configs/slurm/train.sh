#!/bin/bash
# One job on N nodes: sbatch [--nodes=N] configs/slurm/train.sh CONFIG.toml --out_dir=SHARED [--key=value ...]
# Submit it from the repository root, with .venv, data_dir and out_dir on a file system that all nodes share.
# Two minutes before its time limit, and when SIGTERM preempts it, the run saves a checkpoint, exits with 75 and is
# queued again.
#SBATCH --job-name=gptperf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
[ -f .venv/bin/activate ] && . .venv/bin/activate
: "${NPROC_PER_NODE:=gpu}" # processes per node: a number, or "gpu" for one per GPU
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
endpoint=$first:$((20000 + SLURM_JOB_ID % 10000))
export NPROC_PER_NODE endpoint

# torchrun, but with 75 as its exit code if a trainer exits with 75; its own would be 1.
export TORCHRUN='
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except ChildFailedError as error:
    codes = [failure.exitcode for failure in error.failures.values()]
    print(error, file=sys.stderr)
    sys.exit(75 if 75 in codes else 1)
'

# What each node runs. This shell handles USR1 and asks the trainers to stop; torchrun would kill them after 30 s.
node() {
    (
        trap '' USR1
        exec python -c "$TORCHRUN" --nnodes="$SLURM_NNODES" --nproc_per_node="$NPROC_PER_NODE" --max_restarts=0 \
            --rdzv_backend=c10d --rdzv_endpoint="$endpoint" --rdzv_id="$SLURM_JOB_ID" -m gptperf.train "$@"
    ) &
    local agent=$! code
    trap 'pkill -TERM -P "$agent"' USR1
    wait_for "$agent"
    exit "$code"
}

# Waits for a child in spite of signals, and sets `code`.
wait_for() {
    while :; do
        wait "$1"
        code=$?
        kill -0 "$1" 2>/dev/null || return 0
    done
}
export -f node wait_for

# shellcheck disable=SC2016 # expanded on the node
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c 'node "$@"' node "$@" --init_from=auto &
step=$!
trap 'kill -USR1 "$step"' TERM
wait_for "$step"
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
