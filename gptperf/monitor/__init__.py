"""What a run tells of itself: throughput, memory, gradients, stability, the console and the journal."""
