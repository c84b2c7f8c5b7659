"""Is the data there? What can be said of it before any of it is read."""

from rsotrain.config.data import C4DataConfig, DataConfig, FilesDataConfig, InstructionsDataConfig
from rsotrain.data.finding import TEXT_SUFFIXES, data_suffix, find_files
from rsotrain.errors import require


def check_files(data: DataConfig) -> None:
    """Raise UserError where files that ``data`` names are missing or of an unknown kind."""
    if not isinstance(data, C4DataConfig | FilesDataConfig | InstructionsDataConfig):
        return
    files = []
    for key in ("path", "validation_path"):
        path = getattr(data, key)
        if path is not None:
            files += find_files(path, f"data.{key}")
    if isinstance(data, FilesDataConfig):
        require(
            data.sample_by is None or any(data_suffix(f) in TEXT_SUFFIXES for f in files),
            f"data.sample_by={data.sample_by and data.sample_by.name} is for text files"
            f" ({', '.join(TEXT_SUFFIXES)}), and there is none; leave it out",
        )
