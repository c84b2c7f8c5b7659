"""Documents, and files laid out as published data sets have them."""

import gzip
import json
from pathlib import Path

TEXTS = [f"document {i}: the {'ship ' * (i % 7)}é🙂\nsailed" for i in range(700)]


README = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""


def json_lines(texts: list[str], field: str = "text") -> bytes:
    rows = [{field: text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.b/"} for text in texts]
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows]
    return "".join(lines).encode()


def write_c4(folder: Path, num_files: int = 3) -> Path:
    """Shards laid out as those of allenai/c4, and the README by which ``datasets`` finds them."""
    (folder / "en").mkdir(parents=True)
    (folder / "README.md").write_text(README)
    for i in range(num_files):
        part = TEXTS[i * 100 : (i + 1) * 100]
        name = f"en/c4-train.{i:05d}-of-{num_files:05d}.json.gz"
        (folder / name).write_bytes(gzip.compress(json_lines(part)))
    (folder / "en/c4-validation.00000-of-00001.json.gz").write_bytes(gzip.compress(json_lines(TEXTS[600:])))
    return folder
