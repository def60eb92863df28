"""Lines of rows that hold several videos: where each begins, read either way, and how they are kept apart."""

import pytest
import torch
from vacli.temporal.lines import hide, reversed_start, rows_since_start, videos, with_gaps

START = torch.tensor([[1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)


def test_videos_are_where_start_says():
    assert videos(START) == [
        (0, slice(0, 3)),
        (0, slice(3, 4)),
        (0, slice(4, 6)),
        (1, slice(0, 6)),
    ]


def test_row_0_begins_a_video_marked_or_not():
    unmarked = START.clone()
    unmarked[:, 0] = False
    assert videos(unmarked) == videos(START)
    assert rows_since_start(unmarked).tolist() == rows_since_start(START).tolist()
    assert reversed_start(unmarked).tolist() == reversed_start(START).tolist()


def test_rows_are_counted_from_their_videos_start():
    assert rows_since_start(START).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]


def test_backwards_a_video_begins_with_its_last_row():
    assert reversed_start(START).tolist() == [
        [True, False, True, True, False, False],
        [True, False, False, False, False, False],
    ]
    assert reversed_start(reversed_start(START)).equal(START)


@pytest.mark.parametrize("gap", [1, 4])
def test_gaps_keep_videos_apart_and_are_gone_again(gap):
    """A running sum over `gap` rows before each stops at the border; rows and mask come through at their places."""
    x = torch.arange(1.0, 13).view(2, 6, 1)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)

    def run(x, mask):
        x = hide(x, mask)
        return sum(torch.nn.functional.pad(x, (0, 0, n, 0))[:, : x.shape[1]] for n in range(gap + 1))

    alone = torch.empty_like(x)
    for line, part in videos(START):
        alone[line, part] = run(x[line : line + 1, part], mask[line : line + 1, part])[0]
    torch.testing.assert_close(with_gaps(run, x, mask, START, gap), alone)


def test_without_packed_videos_nothing_is_spread():
    x, mask = torch.ones(2, 6, 1), START
    assert with_gaps(lambda x, mask: (x, mask), x, mask, None, 9) == (x, mask)
    assert with_gaps(lambda x, _: x * x.shape[1], x, None, START[1:].expand(2, 6), 9).eq(6).all()
