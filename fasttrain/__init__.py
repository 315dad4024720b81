"""fasttrain: trains an image network fast while frozen, pretrained networks teach it what they know."""
