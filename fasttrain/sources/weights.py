"""Fits weights into a source's network."""

from fasttrain.weights import digest_of, fit

__all__ = ["digest_of", "fit"]
