"""`python -m lit_rlhf` is `lit-rlhf`."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while libraries are read, Ctrl-C has no traceback to show

from lit_rlhf.cli.main import main

main()
