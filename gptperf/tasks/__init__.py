"""Tasks that a model is scored on by likelihood: files, prompts, token sequences, log-likelihoods, scores."""

from gptperf.tasks.files import load_tasks
from gptperf.tasks.items import Item, Task
from gptperf.tasks.requests import TaskRequests, encode_task
from gptperf.tasks.scores import Likelihood, Scores, core, task_scores

__all__ = ["Item", "Likelihood", "Scores", "Task", "TaskRequests", "core", "encode_task", "load_tasks", "task_scores"]
