"""Scores of speech, and what they are worth."""
