"""The training of a tokenizer in a process of its own.

SentencePiece learns in one call that a signal cannot interrupt, on a large text for minutes. A process can be
ended at any time, and the memory that the call took is gone with it, too.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from threading import Thread

from rsotrain.config.data import TrainedTokenizerConfig
from rsotrain.config.keys import from_plain, plain
from rsotrain.data.tokenizer import train_tokenizer
from rsotrain.errors import TrainingError, UserError

_MISTAKE_STATUS = 2


def train_tokenizer_apart(texts: Iterable[str], config: TrainedTokenizerConfig) -> bytes:
    """``train_tokenizer`` of another process, which ends at once with whatever is raised here meanwhile.

    Raises UserError as ``train_tokenizer``, and TrainingError where the process was killed.
    """
    given = json.dumps({"texts": list(texts), "config": plain(config)}).encode()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rsotrain.data.tokenizer_process"],
        input=given,
        stdout=subprocess.PIPE,
        # what this process imports from; a folder of the user's is not to come first
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        process_group=0,  # Ctrl-C is this process's affair
        check=False,
    )
    if done.returncode == _MISTAKE_STATUS:
        raise UserError(done.stdout.decode())
    if done.returncode < 0:
        raise TrainingError(
            f"the process that trains the tokenizer was killed by signal {-done.returncode} (9 is what a"
            " machine short of memory does); give a smaller tokenizer.max_training_bytes"
        )
    done.check_returncode()
    return done.stdout


def _end_with(parent: int) -> None:
    """End this process soon after its parent has, however that happened."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Texts and settings from stdin, the model to stdout; of a mistake the sentence, and status 2."""
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    given = json.load(sys.stdin.buffer)
    try:
        model = train_tokenizer(given["texts"], from_plain(TrainedTokenizerConfig, given["config"]))
    except UserError as error:
        sys.stdout.buffer.write(str(error).encode())
        sys.exit(_MISTAKE_STATUS)
    sys.stdout.buffer.write(model)


if __name__ == "__main__":
    main()
