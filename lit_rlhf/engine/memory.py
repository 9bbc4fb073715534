"""What tensors take: storages counted once, while they are alive; and shapes without numbers, to count before a run.

A FakeTensor of torch has shape, dtype and storage size and no numbers. Ops on it give others, so real code runs on it
and allocates nothing: what is counted on the way is what the code would take.
"""

import gc
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPES = FakeTensorMode(allow_non_fake_inputs=True)
# It would keep a weak reference to each tensor, and torch does not move a module's parameters that have any.
SHAPES.fake_tensor_converter.set_tensor_memo = lambda *tensors: None  # type: ignore[method-assign]


class Planned(NamedTuple):
    """The device that a run is planned for, whichever its tensors without numbers are on."""

    kind: str  # as torch calls it: cuda, cpu
    memory: int  # bytes


PLANNED: list[Planned] = []


@contextmanager
def shapes() -> Iterator[None]:
    """While inside, tensors that are made get no numbers."""
    with uncollected(), warnings.catch_warnings(), SHAPES:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # in torch's own deepcopy
        yield


@contextmanager
def numbers() -> Iterator[None]:
    """While inside, tensors that are made have numbers, within `shapes` too."""
    with unset_fake_temporarily():
        yield


def only_shapes() -> bool:
    """Whether tensors that are made now get no numbers."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor has any."""
    return not isinstance(tensor, FakeTensor)


def total_memory(device: torch.device) -> int:
    """Bytes that a device has, or that it is planned to have."""
    if PLANNED:
        return PLANNED[-1].memory
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def kind_of(device: torch.device) -> str:
    """What kind of device it is, or that which a run is planned for: some code is another on each."""
    return PLANNED[-1].kind if PLANNED else device.type


@contextmanager
def planned_for(kind: str, memory: int) -> Iterator[None]:
    """While inside, tensors stand on a device of this kind and of so many bytes."""
    PLANNED.append(Planned(kind, memory))
    try:
        yield
    finally:
        PLANNED.pop()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of their storages, each counted once."""
    storages = {storage._cdata: storage for storage in map(storage_of, tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """What holds its numbers on this rank."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


class LiveMemory(TorchDispatchMode):
    """Counts, while it is on, the bytes of all storages that ops make, from then until nothing holds them.

    What is asked of a number that is not there is answered by 1 or True.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.phase = ""
        self.peaks: dict[str, int] = {}  # by phase
        self._held: dict[int, tuple[int, Any]] = {}  # bytes of each storage, and the weak reference that tells its end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what was asked, and count what it made."""
        if func is torch.ops.aten._local_scalar_dense.default:
            with unset_fake_temporarily():
                number = torch.ones((), dtype=args[0].dtype) if isinstance(args[0], FakeTensor) else args[0]
                return func(number)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return made

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is counted already; one in oneDNN's own layout has none to be seen."""
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            self._held[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._free(key))
            self.add(storage.nbytes())

    def add(self, size: int) -> None:
        """So many bytes more."""
        self.now += size
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)

    def _free(self, key: int) -> None:
        self.now -= self._held.pop(key)[0]


class Numbers(TorchFunctionMode):
    """Gives zeros for tensors without numbers to what leaves for the host: all to NumPy, vectors to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what asks for numbers; all else goes on."""
        name = getattr(func, "__name__", "")
        if name in ("cpu", "numpy") and isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                if name == "numpy":
                    return torch.zeros(args[0].shape, dtype=args[0].dtype).numpy()
                if args[0].ndim <= 1:
                    return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(memory: LiveMemory) -> Iterator[None]:
    """While inside, code runs on tensors with or without numbers, and what they take is counted."""
    with uncollected(), Numbers(), memory:
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """While inside nothing is garbage-collected, nor what is left from there later: torch 2.13 can crash over it.

    What is left holds no numbers.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
