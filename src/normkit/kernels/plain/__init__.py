"""Normalization in torch operations, in float64: what serves every call that no kernel does."""
