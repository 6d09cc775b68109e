"""What a change of the configuration is worth, over seeds."""
