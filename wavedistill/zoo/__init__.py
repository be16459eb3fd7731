"""Normalizing flows of every family on small densities, each distilled into an inverse autoregressive flow."""
