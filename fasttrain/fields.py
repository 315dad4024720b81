"""A recipe's groups of fields. A field's docstring is its help text on the command line and in docs/fields.md."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Data:
    """What is learned from."""

    name: str = "toy"
    """Data set: beton (a packed file), folder (an ImageFolder tree), tar (WebDataset shards), list (CSV or JSONL), imagenet,
    places365, voc, cifar10, cifar100, stl10, fashion_mnist, elpv, toy; of videos: ucf101, hmdb51, kinetics400, videos (a
    list), motion."""
    root: str | None = None
    """Folder that holds it; of beton, list and videos the file itself."""
    cache: str | None = None
    """Folder on a disk of this machine's own, where data.root lies elsewhere: shards (`fasttrain shard`) are fetched into it
    once, from a shared file system or from a URL (s3://, gs://, https://, .. as fsspec has them). null: ~/.cache/fasttrain/data
    for a URL or a list of shards; a plain .beton is read where it is."""
    sha256: str = ""
    """SHA-256 of the list of shards (`fasttrain shard` prints it), to insist on; needed where data.root is a URL."""
    split: int = 1
    """Official split of ucf101 and hmdb51: 1, 2 or 3."""
    frames: int = 0
    """Frames of a clip, for a target that sees clips; 0: images (of a video, its middle frame)."""
    stride: int = 1
    """From one frame of a clip to the next, in frames of the video."""
    clips: int = 3
    """Evaluation: clips of each video, evenly spread; their probabilities are averaged."""
    crops: Literal[1, 3] = 1
    """Evaluation: 3 takes each clip at both ends of the frame's longer side and in the middle; 1 in the middle."""
    decoder: Literal["auto", "decord", "torchcodec", "pyav", "dali"] = "auto"
    """What decodes videos that are not packed; auto: decord where it is installed. All serve the same frames."""
    labels: str | None = None
    """Pseudo-labels in place of the data set's own: the folder of a run, or row:ROW, whose network's features are clustered as
    `pretext` says; an image's label is the nearest centroid. null: the data set's."""
    labelled: int = 0
    """Labelled training images to use, classes in proportion; 0 for all."""
    indices: str | None = None
    """File that names the training samples to use: their indices in the data set, one a line; null for all."""
    balance: bool = False
    """Draw every class equally often; an epoch stays as long as it is."""
    val_share: float = 0.1
    """Share of the training images held out for validation, where the data set has no such split of its own."""
    verify: bool = True
    """Compare the files with the published checksums, where there are some."""
    loader: str = "auto"
    """resident (the set as uint8 on the device), ffcv (packed file, CPU), dali (packed file or files, GPU or CPU), torch
    (DataLoader), video (clips), synthetic (one random batch, for the compute floor), or auto; all but synthetic serve the
    same."""
    workers: int = -1
    """Threads of ffcv, dali and video, processes of torch (0 decodes in the training process); -1: one for each core."""
    hw_decoder_load: float = 0.65
    """Share of JPEGs that the dali loader gives to a GPU's JPEG engine, where it has one."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """An image or video that cannot be read: stop, or put the next readable one in its place and count it in summary.json."""
    size: int = 32
    """Side in pixels of the images that the target sees."""
    grow_from: int = 0
    """Progressive resizing: side in pixels in the first epochs; 0: always data.size."""
    grow_epochs: list[int] = field(default_factory=lambda: [0, 0])
    """The epochs between which images grow from data.grow_from to data.size, in steps of 32 pixels."""
    stored: int = 0
    """Side in pixels to which the images' centre squares are brought before any view; 0 leaves them as they are."""
    batch: int = 128
    """Images a step, over all devices."""
    drop_last: bool = False
    """Leave out an epoch's last batch if it is not full."""
    crop: Literal["pad", "random_resized", "corner", "centre"] = "pad"
    """Training view: a window shifted by up to `pad` pixels, a random-resized crop, a square of one of five scales in a
    corner or the middle, or always the centre."""
    pad: int = 4
    """Largest shift of crop: pad, in pixels of the stored image."""
    min_area: float = 0.08
    """Smallest share of the image that crop: random_resized takes."""
    centre_share: float = 1.0
    """Evaluation view: side of the centre square, as a share of the shorter side (0.875 is 224 of 256)."""
    mean: list[float] = field(default_factory=lambda: [123.675, 116.28, 103.53])
    """Mean of the target's input, each channel, for pixels of 0 to 255 (default: ImageNet's)."""
    std: list[float] = field(default_factory=lambda: [58.395, 57.12, 57.375])
    """Standard deviation of the target's input, likewise."""
    flip: Literal["none", "horizontal", "both"] = "horizontal"
    """Mirror training views left-right, in both directions independently, or not."""
    views: int = 0
    """Cycle through K views a sample (view = epoch mod K), so that soft targets can be recalled; 0: always new ones."""
    seed: int = 0
    """Of the views. It is not run.seed: runs of several seeds see the same views, and share recalled soft targets."""


@dataclass
class Target:
    """The network being trained."""

    model: str = "resnet20"
    """Backbone: resnet20, resnet32, resnet44 (CIFAR style), resnet18, resnet34, resnet50, mobilenet_v2, densenet121, vgg16_bn
    (torchvision's), timm:NAME (any of timm's that offers features_only); for clips resnet3d18, resnet3d34, resnet3d50 (of
    Hara et al.), r3d_18, mc3_18, r2plus1d_18 (torchvision's)."""
    classes: int = 0
    """Classes of the task; 0 for those of the data set."""
    shortcut: Literal["A", "B"] = "A"
    """Of resnet3d*, where a block changes the shape: A (no parameters, as in the paper's code) or B (1x1x1 convolutions)."""
    width: float = 1.0
    """Factor of all channels of resnet3d*; a transfer module's width is 1000 times this, rounded to an even number."""
    weights: str | None = None
    """What the backbone starts from (heads are always new): a file, package:MODULE, a URL (https://, s3://, ..; with sha256),
    row:ROW (what that row of the recipe has trained with the same seed), or the library's name for weights of this network, such
    as KINETICS400_V1; null: random. Files of torchvision, timm and the 3D ResNets' authors and a run's checkpoints/selected.pt
    fit. Nothing is downloaded without sha256: a library's weights are taken where they are on this machine already."""
    sha256: str = ""
    """SHA-256 of the file of target.weights (or its first digits; of a URL all 64), to insist on, and to allow its download."""
    frozen: int = 0
    """Sections of the backbone that are not trained, from the input on: 0 none, 1 the stem, 2 stem and first stage, .. Their
    batch norms keep their statistics."""


@dataclass
class Source:
    """A frozen network that gives soft labels."""

    name: str
    """What to call it."""
    model: str
    """Network: timm:NAME or torchvision:NAME, or NAME alone (timm's first, then torchvision's); fasttrain: one that a run
    has trained; or clusters: the clusters of its features (see pretext)."""
    weights: str = "default"
    """Weights: a file, package:MODULE (an installed package that holds one), a URL (https://, s3://, ..; with sha256), random,
    or what the library offers: default or one of its names, such as IMAGENET1K_V1. Of models fasttrain and clusters: a run's
    folder or checkpoint, or row:ROW, what that row of the recipe has trained with the same seed. Nothing is downloaded without
    sha256: a library's weights are taken where they are on this machine already."""
    sha256: str = ""
    """SHA-256 of the weights' file (or its first digits; of a URL all 64), to insist on, and to allow its download; of random
    weights, that of the tensors. Empty records it."""
    classes: int = 1000
    """Its classes."""
    size: int = 224
    """Side in pixels of its input."""
    mean: list[float] = field(default_factory=lambda: [123.675, 116.28, 103.53])
    """Mean of its input, each channel, for pixels of 0 to 255 (default: ImageNet's)."""
    std: list[float] = field(default_factory=lambda: [58.395, 57.12, 57.375])
    """Standard deviation of its input, likewise."""
    batch_norm: Literal["eval", "batch"] = "eval"
    """eval: frozen statistics. batch: those of the batch, drifting, as the published code leaves its sources; a soft
    label then depends on the batch, so it is never recalled."""


@dataclass
class Transfer:
    """How the sources teach."""

    sources: list[str] | None = None
    """Which of the recipe's sources to use, by name; null for all."""
    loss: Literal["ce", "kd"] = "ce"
    """Auxiliary loss: soft cross entropy, or KL divergence (the same gradient)."""
    temperature: float = 1.0
    """T, which softens both sides; the loss is multiplied by T squared."""
    alpha: float = 1.0
    """Weight of the auxiliary losses beside the task's."""
    kd_reduction: Literal["batchmean", "mean"] = "batchmean"
    """mean divides by the source's class count as well, as the published code does: the transfer all but vanishes."""
    module: bool = False
    """Auxiliary heads with the paper's transfer module (bottlenecks on every stage) instead of a linear layer."""
    width: int = 0
    """w of the transfer modules, in channels; 0: the backbone's own (docs/paper.md)."""
    together: Literal["auto", "plain", "shared", "grouped"] = "auto"
    """Transfer modules of several sources: plain (one after the other), shared (one first convolution on each stage), grouped
    (all of them one, then grouped convolutions); exact, a matter of speed. auto: plain, the fastest seen so far."""
    pad_to: int = 1
    """Channels of shared and grouped transfer modules are filled up with zeros to a multiple of this (64 for tensor cores)."""
    recompute: bool = False
    """Compute the transfer modules' activations again in the backward pass instead of keeping them: less memory."""
    combine: Literal["sum", "mean"] = "sum"
    """The transfer module's branches: summed (the paper) or averaged (the published code)."""
    still: int = 0
    """Show the sources the same view cut from the image at this side in pixels (of a clip, from its centre frame); 0 enlarges
    what the target sees."""
    recall: bool = True
    """With data.views, compute each view's soft label when it is first met and recall it ever after; without, sources run
    at every step."""
    every_view: bool = False
    """Recall without data.views: crop pad or centre, and flip, have few views (162 with pad: 4), and each has its labels."""
    recall_top: int = 0
    """Keep only this many of a soft label's largest probabilities; the rest is spread evenly. 0: keep all."""
    recall_gib: float = 4.0
    """Memory on the device for recalled soft labels, in GiB; more than that are read from their file at every step."""
    cache: str | None = None
    """Folder of recalled soft labels, shared by all runs that name it; labels of anything else there are refused.
    null: a folder of the run's own (runs/NAME/recall)."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Of the sources' arithmetic; auto: fp32 where run.precision is, else fp16 on a GPU, which rounds 8 times as finely as
    bf16, and on a CPU what the run has."""
    bank: Literal["auto", "plain", "folded", "compiled", "stacked", "graphed"] = "auto"
    """How live sources run: plain (one after the other, as they are), folded (batch norms in the convolutions), compiled,
    stacked (networks of one architecture as one), graphed (CUDA graph); auto: folded on a CPU, on a GPU compiled or graphed
    (not measured there yet)."""


@dataclass
class Method:
    """How target, labels and soft labels become a loss."""

    name: str = "sskt"
    """scratch (labels only); sskt; kd (Hinton et al. 2015: sources with the task's own classes are its teachers); dml (Zhang et
    al. 2018: peers learn from each other); maxl (Liu et al. 2019: a generator learns which sub-classes help the task)."""
    temperature: float = 4.0
    """Of kd: T, which softens both sides; the loss against the teachers is multiplied by T squared."""
    weight: float = 0.9
    """Of kd: weight of the teachers' loss; the labels' has the rest to 1."""
    peers: list[str] | None = None
    """Of dml: the peers' backbones (names as of target.model), each trained beside the target; null: one like the target."""
    peer_weights: list[str | None] | None = None
    """Of dml: what each peer's backbone starts from, as target.weights; null: random."""
    order: Literal["second", "first"] = "second"
    """Of maxl: the generator's gradient through the target's step (second), or by finite differences of it (first)."""
    generator: str = "vgg16_bn"
    """Of maxl: the label generator's backbone (names as of target.model)."""
    subclasses: int = 5
    """Of maxl: sub-classes of each class."""
    entropy: float = 0.2
    """Of maxl: weight of the negative entropy of the batch's mean label, which keeps all sub-classes in use."""
    generator_lr: float = 1e-3
    """Of maxl: the generator's peak learning rate; it follows optim.schedule."""
    generator_weight_decay: float = 5e-4
    """Of maxl: the generator's weight decay."""


@dataclass
class Pretext:
    """Learning without labels: a puzzle made of the images themselves, and clusters of what a network has learned from it."""

    task: Literal["none", "jigsaw"] = "none"
    """What is learned in place of labels; jigsaw: in which order the tiles of an image lie (Noroozi et al. 2018, Jigsaw++)."""
    model: str | None = None
    """Of a recipe without rows, for `fasttrain pretext`: the network that solves puzzles; null: that of target.model."""
    grid: Literal[2, 3] = 3
    """Of jigsaw: tiles in each direction."""
    permutations: int = 701
    """Of jigsaw: orders of the tiles to tell apart, chosen so that any two differ in many places; up to 1512 (24 of 2 x 2)."""
    tile: int = 0
    """Of jigsaw: side in pixels of a tile, which is cut somewhere in its cell of data.size / grid; 0: three quarters of that."""
    channel_shift: int = 2
    """Of jigsaw: each colour of a tile is shifted by 0 to this many pixels, against what chromatic aberration gives away."""
    replaced: int = 2
    """Of jigsaw: 0 to this many tiles are another image's, each number equally often; 0: the plain puzzle (Noroozi and Favaro
    2016)."""
    grey: float = 0.7
    """Of jigsaw: share of the puzzles without colour."""
    width: int = 1024
    """Of jigsaw: units of the layer that every tile has of its own."""
    hidden: int = 4096
    """Of jigsaw: units of the layer that joins the tiles."""
    clusters: int = 1000
    """k: centroids that k-means finds in the features of the run's own training images."""
    layer: int = 0
    """Stage whose features are clustered, 1 for the first; 0: what the network pools for its head."""
    pool: int = 1
    """Side to which the stage's map is max-pooled: features of side x side x channels."""
    unit_length: bool = True
    """Scale features to length 1 before they are clustered."""
    iterations: int = 50
    """Of k-means: passes over the features at most; it ends when no label changes."""
    softness: float = 0.5
    """Of a source of model clusters: its soft labels are softmax(-d^2 / (softness * mean d^2)), with d the distance to each
    centroid, and the mean that to the nearest one over the images that were clustered."""


@dataclass
class Optim:
    """Stochastic gradient descent."""

    epochs: int = 200
    """Passes over the training images."""
    lr: float = 0.1
    """Peak learning rate."""
    backbone_lr: float = 1.0
    """Factor of the learning rate for the backbone; heads always learn at the full rate (fine-tuning)."""
    momentum: float = 0.9
    """Momentum."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    dampening: float = 0.0
    """Dampening of the momentum."""
    weight_decay: float = 5e-4
    """Weight decay, on all parameters (as in the paper's code)."""
    schedule: Literal["step", "cosine", "onecycle", "plateau", "constant"] = "step"
    """step: times gamma at each of milestones. cosine: to 0. onecycle: up over 30 % of the run, then to 0.
    plateau: times gamma after `patience` evaluations without a better validation loss."""
    milestones: list[int] = field(default_factory=lambda: [60, 120, 160, 200])
    """Epochs of schedule: step."""
    gamma: float = 0.2
    """Factor of schedules step and plateau."""
    patience: int = 10
    """Evaluations to wait, for schedule: plateau."""
    warmup_epochs: float = 0.0
    """Rise linearly from 0 over this many epochs first."""
    label_smoothing: float = 0.0
    """Share of the task's label spread over all classes."""
    clip_norm: float = 0.0
    """Scale gradients down to this norm; 0 for never."""
    impl: Literal["torch", "apex"] = "torch"
    """torch.optim.SGD(fused=True), or the FusedSGD of NVIDIA's apex, where that is installed."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is evaluated; 0 for none."""


@dataclass
class Run:
    """Where and how it runs."""

    dir: str = "runs"
    """Folder of all runs; this one's is DIR/NAME."""
    seed: int = 0
    """Of initialisation and order."""
    seeds: int = 1
    """Repeat with this many seeds (seed, seed + 1, ..), and report mean and standard deviation."""
    once: bool = False
    """Of a row: train it with the first seed only; what row:ROW names is then that run, with every seed."""
    parallel: int = 1
    """Train this many runs of seeds and rows side by side, each in a process of its own, CPU threads shared out."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the arithmetic under autocast; auto: on a GPU bf16, or fp16 where it has no bf16; on a CPU fp32."""
    channels_last: bool = True
    """Keep activations and weights in NHWC order."""
    compile: bool | Literal["auto", "graphs", "step"] = "auto"
    """torch.compile the step (input, target, losses, backward): slow to start, then faster. graphs: replay it as CUDA
    graphs, too, for small targets. step: compile it, and replay all of it as one CUDA graph, optimiser and moving average
    included. auto: on a GPU, yes."""
    accumulate: int = 1
    """Take each batch in this many parts whose gradients are added: less memory; batch norm sees the parts. Of several processes
    each takes its share of them, so that 8 parts are the same training on 1, 2, 4 and 8 GPUs; 1: one part for each process."""
    sync_batch_norm: bool = False
    """Batch norm over the parts of all processes together, instead of each part's own statistics."""
    kernels: Literal["auto", "triton", "compiled", "reference"] = "auto"
    """Implementation of the soft-target losses; auto: one fused Triton kernel on CUDA, plain PyTorch elsewhere."""
    threads: int = 0
    """CPU threads; 0 for all cores (shared out between parallel runs)."""
    eval_every: int = 1
    """Epochs between evaluations on the validation split; the last epoch is always evaluated."""
    select: Literal["best", "last"] = "best"
    """Which epoch's weights are tested, once, at the end: the best on the validation split, or the last."""
    protocol: Literal["validation", "paper"] = "validation"
    """What weights are selected on: a validation split, or, as in the paper, the test split itself (nothing is held out, and
    the figure is too good by what selecting gains)."""
    cosine_every: int = 0
    """Steps between measurements of the cosine between the gradients of the task's and each auxiliary loss, on the backbone
    (Du et al. 2018); 0: never. Costs a forward pass and a backward pass for each loss."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    checkpoint_steps: int = 0
    """Steps between checkpoints within an epoch; 0 for only at epochs' ends."""
    keep: int = 2
    """Checkpoints to keep, the newest (last.pt) among them: the one before is used where the newest is damaged."""
    skip_nonfinite: int = 0
    """Steps with a gradient that is not finite to leave out, in the whole run; one more stops it. (With fp16 the loss scaler
    leaves out all of them.)"""
    timeout: float = 600.0
    """Seconds after which a loader that gives no batch, or a process that the others wait for, is late: the run then ends with a
    message that names it, and exit code 75 (try again)."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard events."""
