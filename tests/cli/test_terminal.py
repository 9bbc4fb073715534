"""What is logged while a bar is drawn stands above of it."""

import io
import logging
import sys

from lit_rlhf.cli.terminal import log_above_bars


def test_loggers_that_hold_the_terminal_write_to_what_stands_for_it_while_a_bar_is_drawn(monkeypatch):
    terminal, above, file = io.StringIO(), io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = logging.getLogger("tests.terminal")
    handlers = [logging.StreamHandler(), logging.StreamHandler(file)]
    monkeypatch.setattr(logger, "handlers", handlers)
    log_above_bars()
    monkeypatch.setattr(sys, "stderr", above)  # as rich does
    logger.warning("said")
    assert (terminal.getvalue(), above.getvalue(), file.getvalue()) == ("", "said\n", "said\n")
