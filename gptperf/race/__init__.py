"""Measures how many tokens and how much time one configuration needs to reach the losses of another one."""
