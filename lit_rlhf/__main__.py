"""`python -m lit_rlhf` is `lit-rlhf`."""

import os
import signal
import sys
from importlib.metadata import version
from types import FrameType

from lit_rlhf.cli.commands import HELP, require_checkpoint_there, require_command
from lit_rlhf.cli.run_help import run_help
from lit_rlhf.errors import UserError

# What a launcher tells its ranks, and Lightning reads as it is imported.
OF_LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_PORT", "STANDALONE_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES"),
    *("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE"),
)


def start() -> None:
    """The command line; version, commands, and a name that nothing bears are answered without reading torch."""
    argv = sys.argv[1:]
    if argv == ["--version"]:
        print(f"lit-rlhf {version('lit-rlhf')}")
        return
    if argv in (["--help"], ["-h"]):
        print(HELP)
        return
    if (told := run_help(argv)) is not None:
        print(told)
        return
    try:
        require_command(argv)
        require_checkpoint_there(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for name in OF_LAUNCHERS:
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            print(
                f"error: the environment variable {name} ({value!r}) must be a whole number; unset it", file=sys.stderr
            )
            raise SystemExit(2)
    before = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours = [number for number, handler in before.items() if signal.getsignal(number) is handler]
    for number in ours:  # while libraries are read, Ctrl-C has no traceback to show
        signal.signal(number, end)
    from lit_rlhf.cli.main import main

    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    main()


def end(number: int, frame: FrameType | None) -> None:
    """End before the work began, as `main` does afterwards; no `finally` of what is half imported has a say."""
    os.write(2, f"{signal.Signals(number).name} ended the program before its work began\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    start()
