"""``python -m rsotrain.sweep_file``, the command of ``rsotrain.cli.sweep_file``."""

from rsotrain.cli.sweep_file import main

if __name__ == "__main__":
    main()
