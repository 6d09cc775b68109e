"""Scores a model: its loss on a data set, tasks by likelihood, and tasks that its training data contains."""
