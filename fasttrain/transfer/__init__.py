"""Auxiliary heads: with them a target guesses what each source says of the same sample."""

from .heads import AuxiliaryHead, LinearHead, TransferModule

__all__ = ["AuxiliaryHead", "LinearHead", "TransferModule"]
