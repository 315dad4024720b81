"""What the server of processes imports, once, without starting a thread."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import timm
import torchmetrics.classification
import torchvision
import torchvision.io
from fasttrain.loaders.philox import draw

import fasttrain.cli
import fasttrain.compare
import fasttrain.report
import fasttrain.show

draw(0, 0, [0], 0)  # compiled code is read from its file

__all__ = ["fasttrain", "timm", "torchmetrics", "torchvision"]
