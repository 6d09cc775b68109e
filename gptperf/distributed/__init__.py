"""Several processes: who holds which weights, how they exchange them, who watches whom."""
