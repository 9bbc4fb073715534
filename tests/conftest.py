"""What must be set before any library is imported."""

import os

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # Tianshou: compiling takes longer than its tests
