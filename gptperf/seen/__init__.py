"""Lists the documents that a run read between two iterations."""
