"""`python -m pyralis.bench.train.prepare JOB OUT`: make the model and measure the GPU, in a process that ends then."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from pyralis.bench.measure import Rates, measure_rates
from pyralis.bench.train.made_model import compute_in, made_model
from pyralis.bench.train.settings import MadeModel, TrainBench
from pyralis.errors import PyralisError


@dataclass(frozen=True, slots=True)
class Prepared:
    made: MadeModel | None = None
    rates: Rates | None = None
    error: str | None = None


PREPARED = TypeAdapter(Prepared)


def main() -> None:
    bench = TypeAdapter(TrainBench).validate_json(Path(sys.argv[1]).read_bytes())
    out = Path(sys.argv[2])
    device, _ = compute_in()
    try:
        made = made_model(bench.model, bench.mode, bench.rank, out.parent)
    except PyralisError as error:
        prepared = Prepared(error=str(error))
    else:
        prepared = Prepared(made, measure_rates(device) if device.type == "cuda" else None)
    out.write_bytes(PREPARED.dump_json(prepared))


if __name__ == "__main__":
    main()
