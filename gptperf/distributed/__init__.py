"""Several ranks: which weights each one holds, how they exchange them, and how they end when one fails."""
