"""Data configuration -> the corpora to train and to validate on: where configurations meet readers."""

from dataclasses import replace
from pathlib import Path

from rsotrain.config.data import (
    C4DataConfig,
    DataConfig,
    EmbeddedDataConfig,
    FilesDataConfig,
    HubDataConfig,
    InstructionsDataConfig,
    SampleBy,
    SyntheticDataConfig,
)
from rsotrain.data.documents import Corpus, Fields, InstructionFields, Part, TextField
from rsotrain.data.finding import (
    TEXT_SUFFIXES,
    data_suffix,
    file_stamp,
    find_files,
    folder_files,
    shown,
)
from rsotrain.data.fingerprint import files_fingerprint
from rsotrain.data.held_out import settle_split
from rsotrain.data.hub import HubShard, HubSource, folder_stamps, open_split
from rsotrain.data.readers import FileShard
from rsotrain.data.synthetic import SyntheticShard

CORPUS = Path(__file__).parent / "corpus"
C4 = "allenai/c4", "en"
VALIDATION = "data.validation_path"


def open_corpora(data: DataConfig, cache_dir: Path) -> tuple[Corpus, Corpus]:
    """(training, validation) of a configuration; no more is read than tells that both have documents.

    Raises UserError for files that are missing, empty or of an unknown kind, for a hub that cannot be
    reached, and for a fraction of local files that leaves one of the two without documents.
    """
    match data:
        case EmbeddedDataConfig():
            train, validation = (
                replace(_files(data, [CORPUS / f"{file}.json.gz"], TextField("text"), cache_dir), name=name)
                for file, name in (
                    ("train", "the embedded corpus"),
                    ("validation", "the embedded validation text"),
                )
            )
            return train, validation
        case SyntheticDataConfig():
            return _synthetic(data, 0, data.num_documents), _synthetic(
                data, data.num_documents, data.num_validation_documents
            )
        case FilesDataConfig() | InstructionsDataConfig():
            return _local(data, cache_dir)
        case C4DataConfig(path=None):
            sources = [HubSource(*C4, split, data.revision) for split in ("train", "validation")]
            train, validation = (_hub(data, source, "text", cache_dir) for source in sources)
            return train, validation
        case C4DataConfig():
            assert data.path is not None
            assert data.validation_path is not None  # validate() has seen to it
            files, held_out = find_files(data.path, "data.path"), find_files(data.validation_path, VALIDATION)
            return (
                _files(data, files, TextField("text"), cache_dir),
                _files(data, held_out, TextField("text"), cache_dir, is_read_whole=True),
            )
        case HubDataConfig():
            return _hub_corpora(data, cache_dir)
    raise TypeError(f"no reader for {type(data).__name__}")


def _local(data: FilesDataConfig | InstructionsDataConfig, cache_dir: Path) -> tuple[Corpus, Corpus]:
    if isinstance(data, InstructionsDataConfig):
        fields: Fields = InstructionFields(data.prompt_template, data.response_field)
        sample_by = SampleBy.document
    else:
        fields, sample_by = TextField(data.text_field), data.sample_by or SampleBy.document
    files = find_files(data.path, "data.path")
    if data.validation_path is not None:
        others = find_files(data.validation_path, VALIDATION)
        return (
            _files(data, files, fields, cache_dir, sample_by),
            _files(data, others, fields, cache_dir, sample_by, is_read_whole=True),
        )
    assert data.validation_fraction is not None  # validate() has seen to it
    train, held_out = (
        _files(data, files, fields, cache_dir, sample_by, part, data.validation_fraction)
        for part in (Part.train, Part.held_out)
    )
    texts = sample_by is SampleBy.document and all(data_suffix(file) in TEXT_SUFFIXES for file in files)
    return settle_split(train, held_out, cache_dir, may_cut=texts)


def _files(
    data: DataConfig,
    files: list[Path],
    fields: Fields,
    cache_dir: Path,
    sample_by: SampleBy = SampleBy.document,
    part: Part = Part.whole,
    fraction: float = 0.0,
    is_read_whole: bool = False,
) -> Corpus:
    whole = is_read_whole or not data.streaming
    # before the fingerprint, so that no change between it and the reading goes unseen
    stamps = [file_stamp(file) for file in files]
    empty = [file for file, (size, _) in zip(files, stamps, strict=True) if size == 0]
    first = shown(files[0])
    return Corpus(
        name=f"the data file {first}" if len(files) == 1 else f"the {len(files)} files from {first} on",
        shards=tuple(
            FileShard(file, fields.columns, sample_by, stamp)
            for file, stamp in zip(files, stamps, strict=True)
            if stamp[0] > 0
        ),
        fields=fields,
        fingerprint=files_fingerprint(files, cache_dir, whole=whole),
        part=part,
        fraction=fraction,
        max_bad_rows=data.max_bad_rows,
        settings={"sample_by": sample_by.name, "max_bad_rows": data.max_bad_rows},
        note=f"{len(empty)} of {len(files)} files are empty ({shown(empty[0])})" if empty else None,
    )


def _synthetic(data: SyntheticDataConfig, first: int, number: int) -> Corpus:
    shard = SyntheticShard(number, data.words_per_document, data.num_words, data.corpus_seed, first)
    return Corpus("data=synthetic", (shard,), TextField("text"), fingerprint=repr(shard))


def _hub_corpora(data: HubDataConfig, cache_dir: Path) -> tuple[Corpus, Corpus]:
    train = HubSource(data.name, data.config, data.train_split, data.revision)
    if data.validation_split is not None:
        validation = HubSource(data.name, data.config, data.validation_split, data.revision)
        sources = train, validation
        train_corpus, held_out = (_hub(data, source, data.text_field, cache_dir) for source in sources)
        return train_corpus, held_out
    assert data.validation_fraction is not None  # validate() has seen to it
    return (
        _hub(data, train, data.text_field, cache_dir, Part.train, data.validation_fraction),
        _hub(data, train, data.text_field, cache_dir, Part.held_out, data.validation_fraction),
    )


def _hub(
    data: DataConfig,
    source: HubSource,
    text_field: str,
    cache_dir: Path,
    part: Part = Part.whole,
    fraction: float = 0.0,
) -> Corpus:
    stamps = folder_stamps(source)  # before anything is read, so that no change goes unseen
    num_shards = open_split(source).num_shards
    fingerprint = f"{source!r} {num_shards}"
    if (folder := source.folder) is not None:  # whose files change under the same name
        files = folder_files(folder, "data.name")
        fingerprint += files_fingerprint(files, cache_dir, whole=False)
    return Corpus(
        name=source.name,
        shards=tuple(
            HubShard(source, i, num_shards, (text_field,), stamps=stamps) for i in range(num_shards)
        ),
        fields=TextField(text_field),
        fingerprint=fingerprint,
        part=part,
        fraction=fraction,
        max_bad_rows=data.max_bad_rows,
        remote=True,
        settings={"max_bad_rows": data.max_bad_rows},
    )
