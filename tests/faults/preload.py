"""What the server of processes imports, once, without starting a thread."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import timm
import torchmetrics.classification
import torchvision
import torchvision.io

import fasttrain.cli
import fasttrain.compare
import fasttrain.report
import fasttrain.show

__all__ = ["fasttrain", "timm", "torchmetrics", "torchvision"]
