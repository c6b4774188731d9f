"""Memory of a recording that goes while its replay still runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

# Half a second of replays, and their memory given up at once. Other segments than expandable ones are freed by
# cudaFree, which waits for the device by itself.
PROGRAM = """
import torch
from pyralis.engine.recorders import CudaGraphs

recorder, out = CudaGraphs(torch.device("cuda", 0)), torch.zeros((), device="cuda")

def work():
    x = torch.ones(1 << 27, device="cuda")
    for _ in range(50):
        x = x + 1
    out.copy_(x.mean())

replay = recorder.record(work)
for _ in range(20):
    replay()
del replay
recorder.renew()
torch.cuda.synchronize()
print(out.item())
"""


def test_it_stays_until_the_replay_is_done() -> None:
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == 51
