"""Frames arrive whole and in order, however they are cut on the way; and sequences in them bit by bit."""

import socket
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from served import LENGTH, model

from tangram.core.decoding import Decoder
from tangram.core.sampling import Sampling
from tangram.plugins.serving.wire import Line, frame, packed, unpacked

FRAMES = st.lists(
    st.tuples(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4)), st.binary(max_size=40)),
    max_size=4,
)


@given(frames=FRAMES, cuts=st.lists(st.integers(0, 300), max_size=5))
def test_frames_arrive_whole_and_in_order_however_they_are_cut(frames, cuts) -> None:
    one, other = socket.socketpair()
    sent, heard = b"".join(frame(*each) for each in frames), []
    with one, Line(other) as line:
        places = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
        for start, stop in pairwise(places):
            one.sendall(sent[start:stop])
            heard += line.heard(wait=False)
        assert heard == frames
        one.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            line.heard(wait=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("speculate", [False, True])
def test_a_sequence_is_the_same_after_the_wire(speculate: bool, temperature: float) -> None:
    decoder = Decoder(model(), LENGTH, speculate=speculate)
    decoder.admit([[0, 20, 30]], [Sampling(temperature=temperature, seed=3)])
    decoder.step()
    packet = decoder.release(0)
    found = unpacked(*packed(packet))
    assert len(found.trunk) == len(packet.trunk) and len(found.modules) == len(packet.modules) == int(speculate)
    assert all(map(torch.equal, [*found.trunk, *found.modules], [*packet.trunk, *packet.modules]))
    one, other = found.running, packet.running
    assert (one.tokens, one.sampling, one.draws, one.drafts) == (
        other.tokens,
        other.sampling,
        other.draws,
        other.drafts,
    )
    assert len(one.guesses) == len(other.guesses) and all(map(torch.equal, one.guesses, other.guesses))
    assert one.carried.keys() == other.carried.keys()
    assert all(torch.equal(one.carried[k], other.carried[k]) for k in one.carried)
