"""Logits, or hidden states and an output layer, -> nll and what else one pass gives."""
