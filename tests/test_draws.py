"""Random numbers of every image: their distributions, and that nothing but the image decides on them."""

import pytest
import torch
from scipy import stats

from trainers.draws import Draws, _scramble


def test_the_scrambling_is_splitmix64():
    """The first outputs for the seed 1234567, from the reference implementation."""
    step = torch.tensor(0x9E3779B97F4A7C15 - 2**64)
    found = [int(_scramble(torch.tensor([1234567]) + step * number)) % 2**64 for number in (1, 2, 3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize(
    ("draw", "distribution"),
    [
        (lambda draws: draws.rand(), stats.uniform()),
        (lambda draws: draws.randn(), stats.norm()),
        (lambda draws: draws.beta(0.8), stats.beta(0.8, 0.8)),
        (lambda draws: draws.beta(0.4), stats.beta(0.4, 0.4)),
    ],
    ids=["rand", "randn", "beta 0.8", "beta 0.4"],
)
def test_numbers_are_distributed_as_they_should(draw, distribution):
    draws = Draws.of(5, torch.arange(20_000), "test")
    first, second = draw(draws), draw(draws)
    for values in (first, second):
        assert stats.kstest(values.numpy(), distribution.cdf).pvalue > 1e-3
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.03


def test_integers_come_equally_often():
    counts = Draws.of(0, torch.arange(60_000), "test").integers(-2, 4).add(2).bincount()
    assert len(counts) == 6
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_a_sight_decides_alone():
    whole, part = (Draws.of(7, numbers, "crop") for numbers in (range(10), [8, 3]))
    for shape in ((), (4,), (2, 3)):
        assert torch.equal(whole.rand(*shape)[[8, 3]], part.rand(*shape))
    chosen = torch.arange(10) == 4
    assert torch.equal(whole[chosen].randn(3), whole.randn(3)[4:5])


def test_seeds_purposes_and_calls_draw_apart():
    numbers = torch.arange(1000)
    several = [Draws.of(0, numbers, "crop"), Draws.of(1, numbers, "crop"), Draws.of(0, numbers, "mixing")]
    values = torch.stack([draws.rand() for draws in several] + [several[0].rand()])
    assert torch.corrcoef(values).fill_diagonal_(0).abs().max() < 0.12
