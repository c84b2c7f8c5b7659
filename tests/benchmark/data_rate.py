"""How fast text becomes tokens, in how much memory, and whether streaming keeps up with training.

    python tests/benchmark/data_rate.py tokenise --megabytes 100    # into the cache, in a process of its own
    python tests/benchmark/data_rate.py stream --model llama_9m     # loader's tokens/s beside the step's

The text is the embedded corpus, over and over. Rates are by processor time as well as by the clock, since
other work on the machine stretches the clock.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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
from rsotrain.config import FilesDataConfig, TrainedTokenizerConfig
from rsotrain.data.build_tokenizer import build_tokenizer
from rsotrain.data.build import _tokens
from rsotrain.data.sources import open_corpora
from rsotrain.metrics import peak_resident_bytes
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


def stream(model: str, steps: int) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from test_trainer import compose

    from rsotrain.data.build import build_data
    from rsotrain.trainer import Trainer

    config = compose([f"model={model}", "data.streaming=true", "data.workers=1"])
    with tempfile.TemporaryDirectory() as folder:

        def build() -> object:
            return build_data(
                config.data, config.tokenizer, seq_len=config.seq_len, cache_dir=Path(folder),
                notify=lambda _: None, batch_size=config.batch_size, seed=0,
            )  # fmt: skip

        data = build()
        order, tokens = data.train.order(0), config.batch_size * config.seq_len
        data.train.batch(order.indices(0, config.batch_size))
        start = time.perf_counter()
        for step in range(1, 400):
            data.train.batch(order.indices(step, config.batch_size))
        loader = 399 * tokens / (time.perf_counter() - start)
        data.train.close()
        trainer = Trainer(config, build())
        trainer.train_step()
        waiting = 0.0
        batches = trainer.micro_batches

        def timed() -> object:
            nonlocal waiting
            begin = time.perf_counter()
            result = batches()
            waiting += time.perf_counter() - begin
            return result

        trainer.micro_batches = timed  # type: ignore[method-assign]
        start = time.perf_counter()
        for _ in range(steps):
            trainer.train_step()
        seconds = time.perf_counter() - start
        print(
            f"{model}, {os.cpu_count()} cores: one loader process {loader:,.0f} tokens/s, training"
            f" {steps * tokens / seconds:,.0f} tokens/s, {100 * waiting / seconds:.2f} % of it waiting"
        )
        trainer.data.train.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tokenise", "stream"))
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--model", default="llama_9m")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.what == "tokenise":
        tokenise(arguments.megabytes)
    else:
        stream(arguments.model, arguments.steps)
