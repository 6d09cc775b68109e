"""Measures over several seeds how much each change of a configuration improves the loss."""
