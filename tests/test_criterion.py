"""Losses in training against closed forms and the papers' equations."""

import re

import pytest
import torch
import torch.nn.functional as F

from modeling_vit_custom.modeling_vit_custom import ViTCustomImageClassifierOutput
from trainers.losses import Criterion, Targets, effective_number_weights, logit_adjustment, soft_distillation


LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 1, 1])
ONE_HOT = F.one_hot(LABELS, 4).float()


def output(logits=LOGITS, **heads) -> ViTCustomImageClassifierOutput:
    return ViTCustomImageClassifierOutput(logits=logits, **heads)


def test_cross_entropy_of_mixed_labels():
    probabilities = 0.7 * ONE_HOT + 0.3 * ONE_HOT.roll(1, 0)
    expected = F.cross_entropy(LOGITS, probabilities)
    torch.testing.assert_close(Criterion()(output(), Targets(probabilities)), expected)


def test_binary_cross_entropy_wants_every_class_of_a_mix_whole():
    probabilities = 0.9 * ONE_HOT + 0.1 * ONE_HOT.roll(1, 0)
    wanted = ((ONE_HOT + ONE_HOT.roll(1, 0)) > 0).float()
    expected = F.binary_cross_entropy_with_logits(LOGITS, wanted)
    torch.testing.assert_close(Criterion("binary_cross_entropy")(output(), Targets(probabilities)), expected)


def test_evaluation_is_plain_cross_entropy():
    criterion = Criterion(class_weights=torch.tensor([1.0, 2, 3, 4]), logit_adjustment=torch.ones(4))
    torch.testing.assert_close(criterion(output(), LABELS), F.cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "bce"}, "loss='bce' must be one of cross_entropy, binary_cross_entropy"),
        ({"distillation": "Hard"}, "distillation='Hard' must be one of hard, soft"),
        ({"distillation_weight": 1.5}, "distillation_weight=1.5 must lie between 0 and 1"),
        ({"temperature": 0.0}, "distillation_temperature=0.0 must be above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_choice_that_is_none_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Criterion(**options)


def test_accumulated_batches_add_up_to_one():
    criterion, targets = Criterion(), Targets(ONE_HOT)
    halves = [
        criterion(output(LOGITS[rows]), Targets(ONE_HOT[rows]), num_items_in_batch=6)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(halves), criterion(output(), targets))


def test_class_weights():
    weights = torch.tensor([0.5, 1.0, 2.0, 0.5])
    losses = F.cross_entropy(LOGITS, LABELS, reduction="none")
    expected = (losses * weights[LABELS]).mean()
    torch.testing.assert_close(Criterion(class_weights=weights)(output(), Targets(ONE_HOT)), expected)


def test_effective_number_weights():
    counts = torch.tensor([10, 100, 1000])
    weights = effective_number_weights(counts, 0.99)
    effective = torch.tensor([sum(0.99**i for i in range(int(count))) for count in counts])
    torch.testing.assert_close(weights, (1 / effective) / (1 / effective).mean())
    with pytest.raises(ValueError, match=r"class_weight_beta=1\.0 must lie in \[0, 1\)"):
        effective_number_weights(counts, 1.0)


def test_logit_adjustment_makes_the_prior_the_starting_point():
    """Logits of 0 then mean the classes' frequencies, so that these need not be learnt."""
    counts = torch.tensor([10.0, 30.0, 60.0])
    probabilities = (torch.zeros(3) + logit_adjustment(counts, 1.0)).softmax(0)
    torch.testing.assert_close(probabilities, torch.tensor([0.1, 0.3, 0.6]))
    adjusted = Criterion(logit_adjustment=logit_adjustment(torch.tensor([1.0, 2, 3, 4]), 1.0))
    expected = F.cross_entropy(LOGITS + torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), LABELS)
    torch.testing.assert_close(adjusted(output(), Targets(ONE_HOT)), expected)


TEACHER = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
CLS, DIST = (torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
TWO_HEADS = {"cls_logits": CLS, "distillation_logits": DIST}


def test_hard_distillation():
    criterion = Criterion(distillation="hard", distillation_weight=0.5)
    loss = criterion(output((CLS + DIST) / 2, **TWO_HEADS), Targets(ONE_HOT, TEACHER))
    expected = (F.cross_entropy(CLS, LABELS) + F.cross_entropy(DIST, TEACHER.argmax(1))) / 2
    torch.testing.assert_close(loss, expected)


def test_soft_distillation_is_a_mean_over_images():
    criterion = Criterion(distillation="soft", distillation_weight=0.1, temperature=3.0)
    loss = criterion(output((CLS + DIST) / 2, **TWO_HEADS), Targets(ONE_HOT, TEACHER))
    teacher, student = (TEACHER / 3).softmax(1), (DIST / 3).log_softmax(1)
    divergence = (teacher * (teacher.log() - student)).sum(1).mean() * 9
    torch.testing.assert_close(loss, 0.9 * F.cross_entropy(CLS, LABELS) + 0.1 * divergence)
    assert soft_distillation(TEACHER, TEACHER, 3.0).abs().max() < 1e-5


def test_one_head_learns_from_both():
    loss = Criterion()(output(), Targets(ONE_HOT, TEACHER))
    expected = (F.cross_entropy(LOGITS, LABELS) + F.cross_entropy(LOGITS, TEACHER.argmax(1))) / 2
    torch.testing.assert_close(loss, expected)


def test_without_a_teacher_the_mean_of_both_heads_learns():
    mean = (CLS + DIST) / 2
    loss = Criterion()(output(mean, **TWO_HEADS), Targets(ONE_HOT))
    assert loss.item() == pytest.approx(F.cross_entropy(mean, LABELS).item())
