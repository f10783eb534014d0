"""When lookahead reads are worth their bytes."""

import pytest

from tiny_qmoe_mlx.lookahead import WINDOW, Judge


def verdict(judge, busy, wait, read=0, used=0):
    """Its answer after a window of one second in which so much happened."""
    assert judge.mode == "auto"
    for call in range(WINDOW + 1):
        t = call / WINDOW
        found = judge.wants(int(read * t), int(used * t), busy * t, wait * t, t)
    return found


@pytest.mark.parametrize(
    ("busy", "wait", "expected"),
    [(0.5, 0.3, True), (0.5, 0.01, False), (0.97, 0.6, False), (0.0, 0.0, False)],
    ids=["waits for an idle disk", "hardly waits", "disk is busy", "all in memory"],
)
def test_begins_where_products_wait_for_a_disk_that_has_time(busy, wait, expected):
    assert verdict(Judge(), busy, wait) is expected


@pytest.mark.parametrize(
    ("busy", "read", "used", "expected"),
    [(0.5, 100, 80, True), (0.5, 100, 30, False), (0.97, 100, 90, False)],
    ids=["useful", "mostly wasted", "disk has no time left"],
)
def test_goes_on_while_it_is_useful(busy, read, used, expected):
    assert verdict(Judge(on=True), busy, 0.0, read, used) is expected


def test_on_and_off_are_not_judged_and_other_words_are_refused():
    assert Judge("on").wants(0, 0, 0.0, 0.0, 0.0) and not Judge("off").wants(0, 0, 0.0, 9.0, 1.0)
    with pytest.raises(ValueError, match="should be one of auto, on, off, received 'yes'"):
        Judge("yes")
