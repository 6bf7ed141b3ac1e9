"""``python -m nvembed``."""

from nvembed.cli.main import main

main()
