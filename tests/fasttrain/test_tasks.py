"""Losses and figures of the tasks against float64 by hand, scikit-learn and torchmetrics."""

import json
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, confusion_matrix
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision

from fasttrain.tasks import TASKS, MultiLabel, SingleLabel

# B batch, N samples, K classes, V videos


def labelled(samples: int, classes: int, seed: int = 0, distinct: int | None = None) -> tuple[Tensor, Tensor]:
    """Scores (of ``distinct`` values only, if given) and labels, of which a seventh is not counted; class k is shown by
    about one image in k + 2, and scores higher where it is."""
    rng = np.random.default_rng(seed)
    shown_NK = rng.random((samples, classes)) < 1 / (2 + np.arange(classes))
    score_NK = rng.normal(size=(samples, classes)) + shown_NK
    if distinct is not None:
        score_NK = np.clip(np.round(score_NK), -distinct // 2, distinct // 2)
    targets_NK = np.where(rng.random((samples, classes)) < 1 / 7, -1, shown_NK)
    return torch.from_numpy(score_NK).float(), torch.from_numpy(targets_NK).float()


def sklearn_ap(score_M: Tensor, target_M: Tensor) -> float:
    counted_M = target_M >= 0
    return 100 * average_precision_score(target_M[counted_M].numpy(), score_M[counted_M].numpy())


def slow_11_point(score_N: list[float], target_N: list[float]) -> float:
    """VOC 2007: for t = 0, 0.1, .. 1 the largest precision at a recall of t or more; their mean."""
    ranked = sorted((-s, n, t) for n, (s, t) in enumerate(zip(score_N, target_N, strict=True)) if t >= 0)
    positives, points, right = sum(t > 0 for *_, t in ranked), [], 0
    for seen, (_, _, target) in enumerate(ranked, 1):
        right += target > 0
        points.append((Fraction(right, positives), right / seen))
    return sum(max(p for recall, p in points if recall >= Fraction(t, 10)) for t in range(11)) / 11


SCORES = pytest.mark.parametrize(
    ("samples", "classes", "distinct"), [(300, 20, None), (300, 20, 4), (300, 3, 1), (7, 2, 2), (60, 1, None)]
)


@SCORES
def test_average_precision_is_that_of_scikit_learn(samples, classes, distinct):
    score_NK, targets_NK = labelled(samples, classes, seed=samples, distinct=distinct)
    task = MultiLabel(classes)
    by_class = [sklearn_ap(s, t) for s, t in zip(score_NK.T, targets_NK.T, strict=True)]
    by_image = [sklearn_ap(s, t) for s, t in zip(score_NK, targets_NK, strict=True) if (t > 0).any()]
    figures = task.evaluate(score_NK, targets_NK)
    assert figures["map"] == pytest.approx(np.mean(by_class), abs=2e-5)
    assert figures["sample_ap"] == pytest.approx(np.mean(by_image), abs=1e-10)
    assert task.details(score_NK, targets_NK)["ap_per_class"] == pytest.approx(by_class, abs=2e-5)
    if classes > 1:
        theirs = MultilabelAveragePrecision(classes, average="macro", ignore_index=-1)(score_NK, targets_NK.long())
        assert figures["map"] == pytest.approx(100 * float(theirs), abs=2e-5)


@SCORES
def test_11_point_average_precision_is_the_devkits_rule(samples, classes, distinct):
    score_NK, targets_NK = labelled(samples, classes, seed=samples, distinct=distinct)
    pairs = zip(score_NK.T.tolist(), targets_NK.T.tolist(), strict=True)
    expected = 100 * np.mean([slow_11_point(s, t) for s, t in pairs])
    assert MultiLabel(classes).evaluate(score_NK, targets_NK)["map_11point"] == pytest.approx(expected, abs=1e-10)


def test_11_points_by_hand():
    # right, wrong, (not counted), right, wrong: precision 1 up to a recall of 1/2, then 2/3: 6 and 5 points
    targets_N1 = torch.tensor([[1.0], [0], [-1], [1], [0]])
    score_N1 = torch.tensor([[5.0], [4], [3.5], [3], [2]])
    assert MultiLabel(1).evaluate(score_N1, targets_N1)["map_11point"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    # recalls of exactly 1/10, 2/10, ..: each point is reached, as 3/10 in floating point is not
    targets_N1 = torch.ones(20, 1)
    targets_N1[1::2] = 0
    score_N1 = torch.arange(20.0).neg()[:, None]
    expected = (1 + sum(k / (2 * k - 1) for k in range(1, 11))) / 11
    assert MultiLabel(1).evaluate(score_N1, targets_N1)["map_11point"] == pytest.approx(100 * expected)


def test_only_the_order_of_scores_counts():
    """Scores so large that sigmoids of them are equal."""
    score_NK, targets_NK = labelled(200, 5)
    near, far = (MultiLabel(5).evaluate(scale * score_NK, targets_NK) for scale in (1, 1e4))
    assert {k: v for k, v in near.items() if k != "loss"} == {k: v for k, v in far.items() if k != "loss"}


def test_naming_the_frequent_classes_has_a_high_ap_by_image_only():
    """Why the figure of the published code is not the metric."""
    _, targets_NK = labelled(2000, 20)
    figures = MultiLabel(20).evaluate(targets_NK.clamp(min=0).mean(0).expand(2000, 20), targets_NK)
    assert figures["sample_ap"] > 40 and figures["map"] < 25
    assert MultiLabel(20).metric(targets_NK) == "map"


def test_classes_that_no_image_shows_are_left_out():
    score_NK, targets_NK = labelled(50, 4)
    expected = MultiLabel(2).evaluate(score_NK[:, :2], targets_NK[:, :2])
    targets_NK[:, 2], targets_NK[:, 3] = 0, -1
    task = MultiLabel(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = task.evaluate(score_NK, targets_NK)
    assert figures["map"] == expected["map"] and figures["map_11point"] == expected["map_11point"]
    details = task.details(score_NK, targets_NK)
    assert json.loads(json.dumps(details)) == details
    assert details["ap_per_class"][2:] == [None, None] and None not in details["ap_per_class"][:2]
    with pytest.raises(ValueError, match="none of the 50 samples to be evaluated shows any of the 4 classes"):
        task.evaluate(score_NK, targets_NK.clamp(max=0))


def test_binary_cross_entropy_and_its_gradient():
    logits_BK, targets_BK = labelled(9, 6)
    logits_BK.requires_grad_()
    for smoothing in (0.0, 0.2):
        logits_BK.grad = None
        loss = MultiLabel(6, smoothing).loss(logits_BK, targets_BK)
        loss.backward()
        x, t = logits_BK.detach().double().numpy(), targets_BK.double().numpy()
        counted, y = t >= 0, t * (1 - smoothing) + smoothing / 2
        p = 1 / (1 + np.exp(-x))
        expected = -(y * np.log(p) + (1 - y) * np.log(1 - p))[counted].mean()
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-6)
        gradient = np.where(counted, p - y, 0) / counted.sum()
        assert np.abs(logits_BK.grad.numpy() - gradient).max() < 1e-8
        if not smoothing:
            figures = MultiLabel(6, 0.2).evaluate(logits_BK.detach(), targets_BK)
            assert figures["loss"] == pytest.approx(expected, rel=1e-12)


def test_a_batch_without_a_counted_label():
    logits_BK = torch.randn(3, 4, requires_grad=True)
    loss = MultiLabel(4).loss(logits_BK, -torch.ones(3, 4))
    loss.backward()
    assert loss.item() == 0 and logits_BK.grad.tolist() == torch.zeros(3, 4).tolist()


def kl_by_hand(task: SingleLabel | MultiLabel, s_BK: np.ndarray, t_BK: np.ndarray, temperature: float) -> tuple:
    """The loss and its gradient."""
    s, t = s_BK / temperature, t_BK / temperature
    if isinstance(task, SingleLabel):
        p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (t, s))
        loss, count = (p * np.log(p / q)).sum() / len(s), len(s)
    else:
        p, q = (1 / (1 + np.exp(-x)) for x in (t, s))
        loss, count = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(), s.size
    return temperature**2 * loss, temperature * (q - p) / count


both_tasks = pytest.mark.parametrize("task", [SingleLabel(7), MultiLabel(7)], ids=["single", "multi"])


@both_tasks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_loss_and_its_gradient(task, dtype, temperature):
    generator = torch.Generator().manual_seed(0)
    student_BK, teacher_BK = (3 * torch.randn(5, 7, generator=generator).to(dtype) for _ in range(2))
    student_BK.requires_grad_(), teacher_BK.requires_grad_()
    loss = task.soft_loss(student_BK, teacher_BK, temperature)
    loss.backward()
    expected, gradient = kl_by_hand(
        task, student_BK.detach().double().numpy(), teacher_BK.detach().double().numpy(), temperature
    )
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=2e-6)
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-6
    assert np.abs(student_BK.grad.double().numpy() - gradient).max() <= tolerance * np.abs(gradient).max()
    assert teacher_BK.grad is None
    assert task.soft_loss(teacher_BK, teacher_BK, temperature).item() == pytest.approx(0, abs=1e-6)


@both_tasks
def test_gradients_of_the_soft_loss_keep_their_size_at_high_temperatures(task):
    """What the factor T^2 is for: at high T the gradient tends to that of half the mean squared difference of the logits
    (of the single label's centred logits over K, of the multi label's over 4)."""
    student_BK, teacher_BK = torch.randn(2, 5, 7).double().unbind(0)
    student_BK.requires_grad_()
    task.soft_loss(student_BK, teacher_BK, 1000.0).backward()
    difference_BK = student_BK.detach() - teacher_BK
    if isinstance(task, SingleLabel):
        limit_BK = (difference_BK - difference_BK.mean(1, keepdim=True)) / 7 / 5
    else:
        limit_BK = difference_BK / 4 / 35
    assert (student_BK.grad - limit_BK).abs().max() < 0.01 * limit_BK.abs().max()


def test_soft_loss_of_extreme_logits_is_finite():
    for task in (SingleLabel(2), MultiLabel(2)):
        student_BK = torch.tensor([[300.0, -300.0]], dtype=torch.bfloat16, requires_grad=True)
        loss = task.soft_loss(student_BK, -student_BK, 1.0)
        loss.backward()
        assert loss.item() == 600 if isinstance(task, SingleLabel) else loss.item() == 300
        assert student_BK.grad.isfinite().all() and student_BK.grad[0, 0] > 0


def test_bf16_logits_are_computed_in_float32():
    logits_BK, targets_BK = labelled(200, 6)
    half_BK = logits_BK.bfloat16()
    task = MultiLabel(6)
    assert task.loss(half_BK, targets_BK).item() == task.loss(half_BK.float(), targets_BK).item()
    assert task.evaluate(half_BK, targets_BK) == task.evaluate(half_BK.float(), targets_BK)
    single, targets_B = SingleLabel(6), torch.arange(200) % 6
    assert single.loss(half_BK, targets_B).item() == single.loss(half_BK.float(), targets_B).item()
    assert single.details(half_BK, targets_B) == single.details(half_BK.float(), targets_B)


def test_confusion():
    logits_NK, targets_N = torch.randn(200, 5), torch.randint(0, 4, (200,))
    details = SingleLabel(5).details(logits_NK, targets_N)
    assert details == {"confusion": confusion_matrix(targets_N, logits_NK.argmax(1), labels=range(5)).tolist()}
    assert json.loads(json.dumps(details)) == details


def test_videos_are_judged_by_the_mean_of_their_clips_probabilities():
    video_N = torch.tensor([7, 3, 7, 9, 3, 7, 9, 9])
    _, clip_of = video_N.unique(return_inverse=True)
    logits_NK = 3 * torch.randn(8, 4)
    for task, targets_VX in (
        (SingleLabel(4), torch.tensor([2, 0, 3])),
        (MultiLabel(4), torch.tensor([[1.0, 0, -1, 0], [0, 1, 0, -1], [1, 1, 0, 1]])),
    ):
        activation = torch.Tensor.sigmoid if isinstance(task, MultiLabel) else lambda x: x.softmax(1)
        expected_VK = torch.stack([activation(logits_NK.double())[video_N == v].mean(0) for v in (3, 7, 9)])
        video_logits_VK, found_VX = task.by_video(logits_NK, targets_VX[clip_of], video_N)
        assert found_VX.equal(targets_VX)
        torch.testing.assert_close(activation(video_logits_VK), expected_VK, rtol=1e-12, atol=1e-12)
        figures = task.evaluate_videos(logits_NK, targets_VX[clip_of], video_N)
        expected_logits_VK = expected_VK.logit() if isinstance(task, MultiLabel) else expected_VK.log()
        of_videos = task.evaluate(expected_logits_VK, targets_VX)
        of_clips = task.evaluate(logits_NK, targets_VX[clip_of])
        name = task.metric(targets_VX) if isinstance(task, MultiLabel) else "accuracy"
        assert figures.pop(f"clip_{name}") == pytest.approx(of_clips[name])
        assert figures.pop("loss") == pytest.approx(of_clips["loss"])
        of_videos.pop("loss")
        assert figures == pytest.approx(of_videos)


def test_certain_clips_do_not_tie_their_videos():
    """Probabilities of clips that are 1 in floating point, of which one is surer."""
    logits_N1, video_N = torch.tensor([[50.0], [60], [40], [90]]), torch.tensor([0, 0, 1, 1])
    logits_V1, _ = MultiLabel(1).by_video(logits_N1, torch.ones(4, 1), video_N)
    # the mean of exp(-50) and exp(-60), and of exp(-40) and exp(-90)
    expected = [np.log(2) + 50 - np.log1p(np.exp(-10)), np.log(2) + 40]
    assert logits_V1[:, 0].tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_has_the_same_form(name):
    task = TASKS[name](3, 0.1)
    targets = torch.tensor([0, 1, 2, 2]) if name != "multi_label" else torch.eye(3)[[0, 1, 2, 2]]
    logits_BK = torch.randn(4, 3)
    assert (task.classes, task.head_size) == (3, 3)
    figures = task.evaluate(logits_BK, targets)
    assert {task.metric(targets), "loss"} <= figures.keys()
    assert all(isinstance(v, float) for v in figures.values())
    assert task.evaluate_videos(logits_BK, targets, torch.arange(4)).keys() > figures.keys()
    assert task.loss(logits_BK, targets).ndim == task.soft_loss(logits_BK, logits_BK, 2.0).ndim == 0


def test_single_label_loss_is_cross_entropy():
    logits_BK, targets_B = torch.randn(6, 5), torch.arange(6) % 5
    expected = F.cross_entropy(logits_BK.double(), targets_B, label_smoothing=0.1)
    assert SingleLabel(5, 0.1).loss(logits_BK, targets_B).item() == pytest.approx(expected.item(), rel=1e-6)
