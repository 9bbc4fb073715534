"""What a run leaves behind and shows."""

from lit_rlhf.callbacks.compilation import CompileModel
from lit_rlhf.callbacks.export import CompletionWriter, HuggingFaceExport, RunSummary, SampleTable
from lit_rlhf.callbacks.performance import Performance

__all__ = ["CompileModel", "CompletionWriter", "HuggingFaceExport", "Performance", "RunSummary", "SampleTable"]
