"""The mathematics in NumPy float64: slow, short, and the judge of every other implementation."""
