"""How fast text becomes tokens, in how much memory, and whether the data keeps up with training.

    python tests/benchmark/data_rate.py tokenise --megabytes 100    # into the cache, in a process of its own
    python tests/benchmark/data_rate.py rate --model llama_9m       # batches beside training steps

The text is the embedded corpus, over and over. Rates are by processor time as well as by the clock, since
other work on the machine stretches the clock.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import (
    ROOT,
    Figure,
    build_trainer,
    calm,
    configuration,
    median_seconds,
    report,
    timed,
    use_threads,
)

CORPUS = ROOT / "rsotrain" / "data" / "corpus"


def write_corpus(path: Path, megabytes: float) -> None:
    lines = gzip.decompress((CORPUS / "train.json.gz").read_bytes()).splitlines()
    written = copy = 0
    with gzip.open(path, "wb", compresslevel=1) as out:
        while written < megabytes * 1e6:
            for number, line in enumerate(lines):
                # a number before each text, so that no two documents are the same
                text = f"{copy}.{number} " + json.loads(line)["text"]
                written += len(text.encode())
                out.write(json.dumps({"text": text}).encode() + b"\n")
            copy += 1


def tokenise(megabytes: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.json.gz"
        write_corpus(path, megabytes)
        for workers in (1, None):
            program = f"""
import os, time
from pathlib import Path
from rsotrain.config.schema import FilesDataConfig, TrainedTokenizerConfig
from rsotrain.data.build_tokenizer import build_tokenizer
from rsotrain.data.build import _tokens
from rsotrain.data.sources import open_corpora
from rsotrain.tracking.metrics import peak_resident_bytes
folder = Path({folder!r})
data = FilesDataConfig("files", path={str(path)!r}, validation_path={str(CORPUS / "validation.json.gz")!r})
train, validation = open_corpora(data, folder)
config = TrainedTokenizerConfig("trained")
model = build_tokenizer(config, validation, folder, lambda _: None, streaming=False)
model.use_threads({workers})
start, cpu = time.perf_counter(), time.process_time()
stream, _ = _tokens(train, model, folder / "{workers}", lambda _: None, None)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
rate = stream.num_bytes / 1e6
print(f"{{rate:.0f}} MB, {{len(stream.ids):,}} tokens, threads {workers or "all"}:"
      f" {{rate / seconds:.1f}} MB/s,"
      f" {{rate / cpu:.1f}} MB per processor second, peak {{peak_resident_bytes() / 2**20:.0f}} MiB")
"""
            subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def batches_per_second(config: Any, folder: Path) -> float:
    """Of the step's batches, as the trainer asks for them; the first one, which may wait, left out."""
    from rsotrain.data.build import build_data

    data = build_data(
        config.data, config.tokenizer, seq_len=config.seq_len, cache_dir=folder, notify=lambda _: None,
        batch_size=config.batch_size, seed=0,
    )  # fmt: skip
    order = data.train.order(0)
    data.train.batch(order.indices(0, config.batch_size))
    laps = []
    for first in range(1, 401, 100):
        lap = timed(lambda f=first: [fetch(data, order, s, config.batch_size) for s in range(f, f + 100)])
        laps.append(lap)
    data.train.close()
    return 100 / median_seconds(calm(laps, 2))


def fetch(data: Any, order: Any, step: int, batch_size: int) -> None:
    data.train.batch(order.indices(step * batch_size, batch_size))


def rate(model: str, steps: int, threads: int) -> None:
    """Batches beside training steps, cached and streamed by one process."""
    use_threads(threads)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(f"model={model}", "optimizer=adam", "model.vocab_size=4096")
        trainer.train_step()
        step = median_seconds(calm([timed(trainer.train_step) for _ in range(steps)], steps // 2))
        for name, options in (
            ("cached", []),
            ("streamed by one process", ["data.streaming=true", "data.workers=1"]),
        ):
            per_second = batches_per_second(configuration(*options), Path(folder))
            tokens = per_second * 8 * 256
            detail = f"{tokens:,.0f} tokens/s beside {8 * 256 / step:,.0f}"
            figures.append(Figure("times the training rate", name, per_second * step, 20.0, detail=detail))
    report("data_rate", f"{model}, 8 x 256 tokens, embedded corpus, {threads} threads", figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tokenise", "rate"))
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--model", default="llama_9m")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.what == "tokenise":
        tokenise(arguments.megabytes)
    else:
        rate(arguments.model, arguments.steps, arguments.threads)
