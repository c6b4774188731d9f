"""One module per op, each with `cases(shape, tokens) -> list[BenchCase]`; `bench.ops` finds them by name."""
