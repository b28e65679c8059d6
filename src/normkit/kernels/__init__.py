"""The forward and backward passes that do the work."""
