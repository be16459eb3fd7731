"""Bijections and the densities they define; knows neither audio nor networks."""
