"""Statistics per channel on a CPU: batch norm in both memory layouts."""
