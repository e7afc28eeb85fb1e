"""Texts scored by the workers of a Ray cluster, which may die."""
