"""How long a large fine-tuning set takes to read, check and tokenise, and in how much memory.

    python benchmarks/tokenise.py [--rows 1000000] [--workers 2] [--template qwen] [--json FILE]

Makes a JSONL file of short conversations, builds it with an empty cache and once more from the cache. The peak is the
sum of the proportional set sizes of this process and its children, sampled once a second: what the work takes from
a machine, pages that processes share counted once, mapped pages of the file included. `cpu_seconds` is the work itself,
whatever else the machine does (Linux).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from pyralis.data.dataset import DataSettings, build_dataset, template_for
from pyralis.models.tokenizer import load_tokenizer

VOCABULARY = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man"
)
WORDS = VOCABULARY.split()
WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def write_rows(path: Path, rows: int) -> None:
    """Conversations of one or two rounds, about 60 tokens each, all different."""
    source = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            rounds = [
                {
                    "human": f"{number}: {' '.join(source.choices(WORDS, k=source.randint(4, 16)))}?",
                    "assistant": " ".join(source.choices(WORDS, k=source.randint(4, 40))).capitalize() + ".",
                }
                for _ in range(source.randint(1, 2))
            ]
            file.write(json.dumps({"conversation": rounds}) + "\n")


class PeakMemory(threading.Thread):
    """The largest memory of this process and its children while the block runs, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._over = threading.Event()

    def run(self) -> None:
        this = psutil.Process()
        while not self._over.wait(1):
            found = 0
            for process in [this, *this.children(recursive=True)]:
                with suppress(psutil.Error):  # it ended meanwhile
                    found += process.memory_full_info().pss
            self.peak = max(self.peak, found)

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="whose tokenizer")
    parser.add_argument("--template", default="", help="template_name; the tokenizer's own by default")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    template = template_for("sft", options.template, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, options.rows)
        settings = DataSettings(
            (str(file),), max_seq_length=1024, num_workers=options.workers, cache_dir=str(Path(folder) / "cache")
        )
        cpu_before = sum(sum(resource.getrusage(who)[:2]) for who in WHO)
        with PeakMemory() as memory:
            start = time.perf_counter()
            built = build_dataset(settings, tokenizer, template)
            seconds = time.perf_counter() - start
        cpu_seconds = sum(sum(resource.getrusage(who)[:2]) for who in WHO) - cpu_before
        start = time.perf_counter()
        assert build_dataset(settings, tokenizer, template).from_cache
        again = time.perf_counter() - start
    figures = {
        "rows": options.rows,
        "workers": options.workers,
        "template": options.template or "the tokenizer's own",
        "tokens": built.report.tokens,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "rows_per_second": round(options.rows / seconds),
        "peak_gib": round(memory.peak / 2**30, 2),
        "from_cache_seconds": round(again, 2),
    }
    for name, value in figures.items():
        print(f"{name:20} {value:,}" if isinstance(value, int) else f"{name:20} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
