"""What a run leaves behind and shows."""

from lit_rlhf.callbacks.alarms import Alarms
from lit_rlhf.callbacks.baseline import Baseline
from lit_rlhf.callbacks.compilation import CompileModel
from lit_rlhf.callbacks.completions import CompletionWriter
from lit_rlhf.callbacks.dashboard import Dashboard
from lit_rlhf.callbacks.export import HuggingFaceExport
from lit_rlhf.callbacks.histograms import Histograms
from lit_rlhf.callbacks.memory import MemoryTable
from lit_rlhf.callbacks.performance import Performance
from lit_rlhf.callbacks.progress import OneLineBar, ProgressLines
from lit_rlhf.callbacks.samples import SampleTable
from lit_rlhf.callbacks.stopping import GracefulStop
from lit_rlhf.callbacks.summary import RunSummary

__all__ = [
    "Alarms",
    "Baseline",
    "CompileModel",
    "CompletionWriter",
    "Dashboard",
    "GracefulStop",
    "Histograms",
    "HuggingFaceExport",
    "MemoryTable",
    "OneLineBar",
    "Performance",
    "ProgressLines",
    "RunSummary",
    "SampleTable",
]
