"""What calls on a GPU keep, without one."""

import weakref

from ep_kernels.cuda_pending import PendingCalls


class Kept:
    """Notes on which stream it died."""

    def __init__(self, pending, deaths):
        weakref.finalize(self, lambda: deaths.append(pending.stream_of_dying))


def test_what_a_call_used_dies_on_the_stream_of_the_call():
    pending, deaths = PendingCalls(), []
    for number, stream in ((4, 70), (5, 80), (6, 90)):
        pending.add(number, (Kept(pending, deaths),), stream)
    assert (pending.oldest(), pending.numbers()) == (4, [4, 5, 6])
    pending.drop(5)
    assert (deaths, pending.numbers()) == ([80], [4, 6])
    pending.drop(5)  # known to be over
    pending.drop(4)
    assert (deaths, pending.oldest()) == ([80, 70], 6)
    assert pending.stream_of_dying is None
    pending.clear()
    assert (deaths, pending.oldest()) == ([80, 70, None], None)
