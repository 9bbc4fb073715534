"""`python -m lit_rlhf` is `lit-rlhf`."""

import signal
import sys
from importlib.metadata import version


def start() -> None:
    """The command line; the version is told without reading torch."""
    if sys.argv[1:] == ["--version"]:
        print(f"lit-rlhf {version('lit-rlhf')}")
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while libraries are read, Ctrl-C has no traceback to show
    from lit_rlhf.cli.main import main

    main()


if __name__ == "__main__":
    start()
