"""evaluate, generate, export and fine-tuning through the command, from runs and Hugging Face folders."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Cli
from helpers.huggingface import write_folder
from helpers.runs import EACH_OPTIMIZER, compose, load_data
from omegaconf.errors import OmegaConfBaseException

from rsotrain.cli.dispatch import run_mode
from rsotrain.cli.mistakes import explain
from rsotrain.config.data import GenerateConfig
from rsotrain.config.validation import validate
from rsotrain.data.tokenizer import SentencePieceTokenizer
from rsotrain.data.validation import check_files
from rsotrain.errors import UserError
from rsotrain.models.generation import generate_tokens
from rsotrain.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "extra", [["data.packing=padded"], pytest.param(["data.document_mask=true"], marks=pytest.mark.slow)]
)
def test_a_run_is_evaluated_exported_and_continued(
    extra: list[str], cli: Cli, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*tiny, *extra, "run_name=r", "model.pad_vocab_to_multiple_of=64"]
    assert cli(*command).returncode == 0
    run = tmp_path / "outputs/r"
    summary = json.loads((run / "summary.json").read_text())
    monkeypatch.chdir(tmp_path)

    def here(*arguments: str) -> dict[str, Any]:
        config = compose([*command, *arguments])
        validate(config)
        return run_mode(config)

    evaluated = cli(*command, "mode=evaluate")
    assert evaluated.returncode == 0, evaluated.stderr
    for checkpoint in ("outputs/r", "outputs/r/checkpoints/step_00000006"):
        here("mode=evaluate", f"checkpoint.path={checkpoint}")
    here("mode=export")
    config = json.loads((run / "export/config.json").read_text())
    assert config["vocab_size"] == 320
    with pytest.raises(UserError, match="overwrite=true replaces it"):
        here("mode=export")
    here("mode=evaluate", "checkpoint.path=outputs/r/export")
    with pytest.raises(UserError, match=r"outputs/r is a run; give another folder"):
        here("mode=export", "export.path=outputs/r")
    with pytest.raises(UserError, match=r"seq_len=300 is longer than the 256 positions of outputs/r/"):
        here("mode=evaluate", "seq_len=300")
    config["max_position_embeddings"] = 1 << 12  # more than the model of the command line has
    (run / "export/config.json").write_text(json.dumps(config))
    assert here("mode=evaluate", "checkpoint.path=outputs/r/export", "seq_len=300")["seq_len"] == 300
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert len(lines) == 3  # a foreign folder is not written to
    for line in lines:
        for name in ("val/loss", "val/perplexity", "val/bits_per_byte"):
            assert line[name] == pytest.approx(summary[name], rel=1e-6)
    written = [
        here("mode=generate", "generate.prompts=[the,'']", "generate.max_new_tokens=5") for _ in range(2)
    ]
    assert written[0] == written[1]
    assert [prompt for prompt, _ in written[0]["samples"]] == ["the", ""]
    continued = cli(
        *[o for o in tiny if not o.startswith(("model=", "tokenizer."))], "model=pretrained",
        f"model.init_from={run}/export", "tokenizer=huggingface", "tokenizer.path=${model.init_from}",
        "optimizer.lr=0", "steps=1", *extra, "run_name=c",
    )  # fmt: skip
    assert continued.returncode == 0, continued.stderr
    after = json.loads((tmp_path / "outputs/c/summary.json").read_text())
    assert after["val/loss"] == pytest.approx(summary["val/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mode=evaluate"], "is neither a run with a checkpoint"),
        (["mode=evaluate", "checkpoint.path=nowhere"], "checkpoint.path=nowhere is not a folder"),
        (["mode=export", "checkpoint.path=.", "checkpoint.load=weights"], "is for training"),
        (["evaluation.tasks=[x]"], "evaluation.tasks is for mode=evaluate"),
        (["export.path=x"], "are for mode=export"),
        (["model=pretrained"], "model.init_from has no value"),
        (["model=pretrained", "model.init_from=nowhere"], "config.json cannot be read"),
        (["model.init_from=somewhere"], "tokenizer=trained is trained on this data"),
        (["data.packing=padded", "data.document_mask=true"], "data.document_mask has no effect"),
        (["model.vocab_size=320", "model.pad_vocab_to_multiple_of=64"], "leave one of them out"),
        (["data=c4", "data.path=x"], "give both data.path and data.validation_path"),
        (["data=instructions", "data.packing=packed"], "needs data.packing=padded"),
        (["data=instructions", "data.prompt_template='{a:d}'"], "takes fields by name and as they are"),
        (["data=instructions", "data.prompt_template='{a!x}'"], "takes fields by name and as they are"),
        (["tokenizer=sentencepiece", "tokenizer.path=nowhere"], "tokenizer.path=nowhere is not a file"),
        (["data.lanes=2"], "data.lanes=2 is for data.streaming=true; leave it out"),
        (["data.sample_by=line"], "data.sample_by=line is for text files"),
        (["data.validation_fraction=0.1"], "either data.validation_path=… or data.validation_fraction"),
    ],
)
def test_one_sentence_for_each_mistake(
    arguments: list[str], sentence: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0].startswith("data=c4"):
        tiny = [o for o in tiny if not o.startswith("data")]
    if arguments[0].startswith("model=pre"):
        tiny = [o for o in tiny if not o.startswith("model")]
    if arguments[0].startswith("tokenizer="):
        tiny = [o for o in tiny if not o.startswith("tokenizer")]
    with pytest.raises((UserError, OmegaConfBaseException)) as caught:  # noqa: PT012 (any of the three)
        config = compose([*tiny, *arguments])
        validate(config)
        check_files(config.data)
        run_mode(config)
    told = explain(caught.value)
    assert sentence in told
    assert "\n" not in told


def instructions(path: Path, num: int = 40) -> Path:
    rows = [{"instruction": f"add {i} and {i}", "output": f"it is {2 * i}"} for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with a tokenizer, as a Hugging Face folder."""
    from helpers.huggingface import trained

    from rsotrain.config.data import TrainedTokenizerConfig
    from rsotrain.data.tokenizer import train_tokenizer
    from rsotrain.inference.export import export_huggingface

    folder = tmp_path_factory.mktemp("base")
    model = train_tokenizer(
        ["add 1 and 2: it is 34567890\n### Response"] * 9, TrainedTokenizerConfig(vocab_size=290)
    )
    export_huggingface(trained(write_folder(folder / "in"), model), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("optimizer", EACH_OPTIMIZER)
def test_every_optimizer_fine_tunes_on_responses(
    optimizer: str, base: Path, tmp_path: Path, cache_dir: Path
) -> None:
    config = compose(
        ["experiment=finetune_sft", f"optimizer={optimizer}", f"model.init_from={base}", "steps=3",
         f"data.path={instructions(tmp_path / 'a.jsonl')}", "data.validation_fraction=0.2", "seq_len=64",
         "batch_size=4", "precision=fp32", f"output_dir={tmp_path}"]
    )  # fmt: skip
    validate(config)
    trainer = Trainer(config, load_data(config, cache_dir))
    before = trainer.evaluate()["val/loss"]
    inputs, targets = trainer.data.train.batch(trainer.order.indices(0, 4))
    for row, target in zip(inputs, targets, strict=True):
        scored = target[target != -100]
        text = trainer.data.tokenizer.decode(scored)
        assert text.startswith("it is ")
        assert scored[-1] == trainer.data.tokenizer.eos_id
        first = int((target != -100).nonzero()[0])
        prompt = trainer.data.tokenizer.decode(row[: first + 1])
        assert prompt.startswith("### Instruction:\nadd ")
        assert prompt.endswith("### Response:\n")
    result = trainer.train_step()
    assert result.tokens == int((targets != -100).sum())
    for _ in range(2):
        trainer.train_step()
    assert math.isfinite(trainer.evaluate()["val/loss"])
    assert trainer.evaluate()["val/loss"] != before


def test_a_fraction_that_holds_nothing_out_is_named(base: Path, tmp_path: Path, cache_dir: Path) -> None:
    path = instructions(tmp_path / "a.jsonl", 3)
    config = compose(["experiment=finetune_sft", f"model.init_from={base}", f"data.path={path}"])
    with pytest.raises(UserError, match=r"data.validation_fraction=0.02 leaves none of the 3 documents of"):
        load_data(config, cache_dir)


def test_prompts_that_fill_a_sequence_are_left_out(base: Path, tmp_path: Path, cache_dir: Path) -> None:
    overrides = ["experiment=finetune_sft", f"model.init_from={base}", "seq_len=16"]
    path = instructions(tmp_path / "a.jsonl")
    config = compose([*overrides, f"data.path={path}", "data.validation_fraction=0.5"])
    with pytest.raises(UserError, match="no document whose prompt leaves room in seq_len=16"):
        load_data(config, cache_dir)


class Echo(torch.nn.Module):
    """Logits that favour the token after the last, whatever the rows beside it hold."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 50.0 * torch.nn.functional.one_hot((tokens + 1) % 12, 12).float()


@pytest.mark.parametrize("temperature", [0.0, 1e-50, 0.5])
def test_generation_stops_at_eos_and_rows_do_not_mix(temperature: float) -> None:
    config = GenerateConfig(temperature=temperature, max_new_tokens=4, top_k=3)

    def run(prompts: list[list[int]], num_ids: int = 12) -> list[list[int]]:
        return generate_tokens(
            Echo(),
            prompts,
            config,
            eos_id=9,
            num_ids=num_ids,
            max_context=3,
            device=torch.device("cpu"),
            seed=0,
        )

    assert run([[1], [5, 6, 7, 2], [6]]) == [[2, 3, 4, 5], [3, 4, 5, 6], [7, 8]]
    assert all(token < 5 for token in run([[3]], num_ids=5)[0])  # rows that pad the vocabulary


def test_a_tokenizer_of_more_ids_than_rows_is_refused(base: Path, tmp_path: Path, cache_dir: Path) -> None:
    config = compose(
        ["tokenizer=huggingface", f"tokenizer.path={base}", "data=synthetic", "model=llama_tiny",
         "model.vocab_size=100", "seq_len=64"]
    )  # fmt: skip
    with pytest.raises(UserError, match=r"model.vocab_size=100 is smaller than the tokenizer's 290 pieces"):
        Trainer(config, load_data(config, cache_dir))


@pytest.mark.slow
def test_a_streamed_padded_run_resumes_to_the_bit(cli: Cli, tmp_path: Path, tiny: list[str]) -> None:
    from helpers.run_folders import assert_same_tensors

    command = [*tiny, "data.streaming=true", "data.packing=padded", "steps=40", "save_every=7"]
    assert cli(*command, "run_name=s").returncode == 0
    assert cli(*command, "run_name=r", "max_seconds=0.1").returncode == 75
    result = cli(*command, "run_name=r", "data.workers=2")
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    last = "checkpoints/step_00000040"
    assert_same_tensors(tmp_path / "outputs/r" / last, tmp_path / "outputs/s" / last)
    tokens = json.loads((tmp_path / "outputs/r/summary.json").read_text())["tokens"]
    assert tokens <= 40 * 4 * 32


def test_special_ids_of_a_sentencepiece_model_are_checked() -> None:
    import io

    import sentencepiece

    def train(**ids: int) -> bytes:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the whale"] * 9), model_writer=model, vocab_size=20, minloglevel=2,
            hard_vocab_limit=False, **ids,
        )  # fmt: skip
        return model.getvalue()

    with pytest.raises(UserError, match=r"x has no end-of-sequence piece \(its eos id is -1\)"):
        SentencePieceTokenizer(train(eos_id=-1), "x")
    with pytest.raises(UserError, match="x is not a SentencePiece model"):
        SentencePieceTokenizer(b"no model", "x")
    tokenizer = SentencePieceTokenizer(train(pad_id=0, eos_id=1, unk_id=2, bos_id=-1), "x")  # as T5 has them
    assert (tokenizer.eos_id, tokenizer.bos_id) == (1, -1)
    assert tokenizer.decode(tokenizer.encode(["the whale"])[0]) == "the whale"
