"""Small tokenizer.json files of every kind, as other packages write them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The whale swam under the ship, and 1851 of them saw it.\n",
    "Call me Ishmael; it is 3 o'clock.\n\n",
] * 9
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
KINDS = ("bpe", "unigram", "wordpiece", "wordlevel")
PROCESSORS = ("none", "template", "sequence", "roberta", "bert")


def build(kind: str, processor: str = "none", size: int = 290) -> Tokenizer:
    """``processor``: what puts special tokens around a text; "template" and "sequence" put <s> before it."""
    trainer: Any
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>")
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=SPECIAL)
    trainer.show_progress = False
    tokenizer.train_from_iterator(TEXTS, trainer)
    template = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    processor_of = {
        "template": template,
        "sequence": processors.Sequence([processors.ByteLevel(trim_offsets=False), template]),
        "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
        "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
    }
    if processor != "none":
        tokenizer.post_processor = processor_of[processor]
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=20, pad_id=3, pad_token="<pad>")
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, **configuration: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    values = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    } | configuration
    values["add_bos_token"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder
