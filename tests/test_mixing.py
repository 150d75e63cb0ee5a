"""Mixup and CutMix: pixels and labels agree, image by image."""

import pytest
import torch

from trainers.draws import Draws
from trainers.mixing import Mixing, neighbours, smooth


def mix(count: int = 512, **options):
    """Mix images that are constant, each with a value and a class of its own."""
    defaults = {"mixup": 0.0, "cutmix": 0.0, "probability": 1.0, "switch_probability": 0.5, "num_labels": count}
    values = torch.arange(1.0, count + 1)
    pixels = values.view(-1, 1, 1, 1).expand(-1, 1, 16, 24)
    mixed, targets = Mixing(**{**defaults, **options})(pixels, torch.arange(count), Draws.any(count))
    return values, mixed, targets


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}], ids=str)
def test_labels_say_what_the_pixels_hold(options):
    values, mixed, targets = mix(**options)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(targets)))
    torch.testing.assert_close(targets @ values, mixed.mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-3)
    assert ((targets > 0).sum(dim=1) <= 2).all()


def test_mixup_blends_and_cutmix_pastes():
    _, mixed, _ = mix(mixup=0.8)
    assert (mixed == mixed[:, :, :1, :1]).all()
    values, mixed, _ = mix(cutmix=1.0)
    assert torch.isin(mixed, values).all()
    pasted = (mixed != mixed[:, :, :1, :1]).any(dim=(1, 2, 3)).float().mean()
    assert pasted > 0.5


def test_shares_follow_the_beta_distribution():
    _, _, targets = mix(4000, mixup=0.8)
    share = targets.diagonal()
    expected = torch.distributions.Beta(0.8, 0.8)
    assert share.mean().item() == pytest.approx(expected.mean.item(), abs=0.02)
    assert share.std().item() == pytest.approx(expected.stddev.item(), abs=0.02)


def test_half_are_cut_where_both_are_on():
    _, mixed, _ = mix(2000, mixup=0.8, cutmix=1.0, switch_probability=0.25)
    cut = (mixed == mixed.round()).all(dim=(1, 2, 3)).float().mean()
    assert cut.item() == pytest.approx(0.25, abs=0.03)


def test_a_share_of_the_images_is_mixed():
    values, mixed, targets = mix(2000, mixup=0.8, probability=0.3)
    untouched = (mixed == values.view(-1, 1, 1, 1)).all(dim=(1, 2, 3))
    assert untouched.float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert (targets[untouched].amax(dim=1) > 0.999).all()  # neighbours differ by little


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -0.1}, r"mixup=-0\.1 must be 0 or more"),
        ({"cutmix": float("nan")}, "cutmix=nan must be 0 or more"),
        ({"probability": 1.1}, r"mix_probability=1\.1 must lie between 0 and 1"),
        ({"label_smoothing": -1.0}, r"label_smoothing=-1\.0 must lie between 0 and 1"),
    ],
    ids=["mixup", "cutmix", "probability", "smoothing"],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mix(4, **options)


def test_off_leaves_pixels_and_smooths_labels():
    pixels, labels = torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 4])
    mixing = Mixing(0.8, 1.0, 1.0, 0.5, num_labels=5, label_smoothing=0.1)
    mixing.is_on = False
    same, targets = mixing(pixels, labels, Draws.any(3))
    assert same is pixels
    torch.testing.assert_close(targets, smooth(torch.eye(5)[labels], 0.1))
    torch.testing.assert_close(targets[1], torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))


def test_neighbours_are_mixed_wherever_a_batch_is_divided():
    assert [neighbours(count).tolist() for count in (1, 2, 5)] == [[0], [1, 0], [1, 0, 3, 2, 3]]
    pixels, labels, mixing = torch.rand(8, 3, 16, 16), torch.arange(8), Mixing(0.8, 1.0, 1.0, 0.5, 8)
    whole = mixing(pixels, labels, Draws.of(0, labels, "mixing"))
    halves = slice(4), slice(4, 8)
    parts = [mixing(pixels[half], labels[half], Draws.of(0, labels[half], "mixing")) for half in halves]
    for one, several in zip(whole, zip(*parts)):
        assert torch.equal(one, torch.cat(several))
