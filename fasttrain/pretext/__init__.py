"""Learning without labels (Noroozi et al. 2018): a puzzle, clusters of what a network has learned from it, and pseudo-labels."""
