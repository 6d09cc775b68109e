"""The training run: engine, step, loop, evaluation, resume, reporting."""
