"""The two functions that a transformers Trainer takes, and what they know of its batches."""
