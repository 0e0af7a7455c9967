"""Works that go side by side, phase by phase, so that what one sends travels while the other computes."""

from collections.abc import Iterator


def side_by_side(*works: Iterator[str]) -> None:
    """Take works phase by phase in turn; of phases that are next, those that compute are issued first.

    A work yields the lane of its next phase, and does that phase when asked for the one after it. On a device, what
    communicates then runs while what was issued before it computes.
    """
    lanes = {work: lane for work in works if (lane := next(work, None)) is not None}
    while lanes:
        for work in sorted(lanes, key=lambda work: lanes[work] != "compute"):
            lane = next(work, None)
            if lane is None:
                del lanes[work]
            else:
                lanes[work] = lane
