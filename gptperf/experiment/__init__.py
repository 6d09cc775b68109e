"""What the commands share that train many runs: runs, processes on GPUs, learning rates, statistics."""
