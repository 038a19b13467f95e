"""Tests of the request to stop."""

import os
import signal

import pytest

from fedjax_safety import interrupt


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_told_when_asked(signum):
  before = signal.getsignal(signum)
  with interrupt.StopRequest() as stop:
    stop.check()
    os.kill(os.getpid(), signum)
    assert stop.requested
    with pytest.raises(interrupt.Interrupted):
      stop.check()
  assert signal.getsignal(signum) is before


def test_a_second_interrupt_from_the_keyboard_stops_at_once():
  with interrupt.StopRequest():
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
