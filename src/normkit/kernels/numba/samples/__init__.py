"""Statistics per sample on a CPU: layer, RMS, group and instance norm."""
