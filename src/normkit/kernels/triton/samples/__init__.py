"""Statistics per sample on a GPU: layer, RMS, group and instance norm."""
