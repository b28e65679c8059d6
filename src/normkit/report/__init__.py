"""Findings and results as pages, figures and tables."""
