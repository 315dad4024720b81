"""Auxiliary heads: with them a target guesses what each source says of the same sample."""

from .heads import AuxiliaryHead, LinearHead, TransferModule
from .together import run_together

__all__ = ["AuxiliaryHead", "LinearHead", "TransferModule", "run_together"]
