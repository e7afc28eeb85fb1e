"""Sums -> perplexity, intervals, comparisons; by group, by position. NumPy only."""
