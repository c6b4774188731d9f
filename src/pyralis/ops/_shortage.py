"""Whether an error says that a GPU's memory ran short."""

from __future__ import annotations

import torch

# What libraries say that ask the driver for memory themselves: https://docs.nvidia.com/cuda/cublas/#cublasstatus-t,
# https://docs.nvidia.com/deeplearning/cudnn/latest/api/cudnn-graph-library.html. Torch raises RuntimeError with it.
LIBRARIES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED")


def ran_short(error: BaseException) -> bool:
    """Whether the same work may do with more room on the GPU: torch's allocator, cuBLAS or cuDNN found none.

    Not "CUDA error: out of memory", which the driver says of pinned memory of the host, too.
    """
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in LIBRARIES)
