"""What a disk or file system would not do, in one line."""

import errno
import os
import re
import shutil
from pathlib import Path

DISK_ERRORS = {  # by what a user can mend, in room, rights and names
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}
OF_RUST = re.compile(r"\(os error (\d+)\)")  # in what tokenizers and safetensors raise, which is no OSError


def refused_by_disk(error: BaseException) -> OSError | None:
    """What a disk or file system would not do, if that is what an error is about."""
    if isinstance(error, OSError):
        return error if error.errno in DISK_ERRORS else None
    number = OF_RUST.search(str(error)) if type(error).__name__ in ("Exception", "SafetensorError") else None
    if number is None or int(number[1]) not in DISK_ERRORS:
        return None
    return OSError(int(number[1]), os.strerror(int(number[1])))


def disk_error(error: OSError, root: Path) -> str:
    """What a disk would not do, and to which file; to those of which run, where a library leaves the file out."""
    if error.filename is not None:
        is_file = error.errno == errno.EEXIST and not Path(error.filename).is_dir()
        return f"{error.filename}: {error.strerror}{', and is no folder' * is_file}"
    if error.errno == errno.EFBIG:
        return f"{error.strerror}, while files of {root.absolute()} were written; `ulimit -f` or the disk sets a limit"
    free = shutil.disk_usage(root).free / 2**20
    return f"{error.strerror}, while files of {root.absolute()} were written; {free:.0f} MB are free there"
