"""The training run: checks, engine, step, optimizers, loop, evaluation, resume and reporting."""
