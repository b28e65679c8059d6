"""Statistics per channel on a GPU: batch norm in both memory layouts."""
