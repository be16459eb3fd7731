"""The ways to draw a waveform; every loop that steps a network through time."""
