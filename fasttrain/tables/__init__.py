"""fasttrain table: the paper's tables, every row of them, ours beside theirs.

    fasttrain table N [--rows PATTERN[,PATTERN..]] [--data-root DIR] [--weights DIR] [--seeds K] [--budget full|smoke]
                      [--protocol validation|paper] [--parallel K] [--dir DIR] [--list] [--field value ...]

  N             2 to 8, fig4, or all (with --budget smoke, --list or --rows)
  --rows        train only the rows whose id is like one of these (stl10/*) or holds it (resnet20); --list shows all ids
  --data-root   folder of data sets: DIR/cifar10, DIR/cifar100, DIR/stl10, DIR/places365, DIR/imagenet, DIR/voc, DIR/ucf101,
                DIR/hmdb51, each as `fasttrain train` takes it for data.root; a packed DIR/NAME.beton is taken if it is there
  --weights     folder of resnet50_places365.pth.tar (CSAIL's Places365), resnet-18-kinetics.pth (Hara et al.'s Kinetics) and,
                where nothing can be downloaded, torchvision's resnet50-0676ba61.pth and resnet18-f37072fd.pth;
                DATA-ROOT/weights if not given
  --seeds       runs of each row, with seeds 0, 1, ..; 3 if not given (1 with --budget smoke)
  --budget      smoke: every row small, one epoch of two steps on made-up data, to see that it runs; nothing else is needed
  --protocol    paper: weights are selected on the test split, as published; its rows are kept apart
  --parallel    runs side by side; as many as there are GPUs if not given
  --dir         folder of all runs and tables; runs/tables if not given
  --list        only say what is done, what would run, and what is missing
  --field value any field of a recipe, for every row: --optim.epochs 100

A row that is in several tables is one run. What is done is kept, and what was stopped goes on. A row whose data or weights are
not there is `not run`, with the reason; the others run, and the exit code is then 1. Left behind: DIR/tableN.md, .csv, .json and
.png, and the runs in DIR/ID/seedK; of --budget smoke in DIR/smoke, of --protocol paper in DIR/protocol-paper. docs/paper.md
says what each row is made of.
"""

from .run import OPTIONS, main

__all__ = ["OPTIONS", "main"]
