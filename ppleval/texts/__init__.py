"""Texts or conversations -> ids -> windows -> a model -> the score of each text."""
