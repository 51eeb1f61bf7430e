"""`python -m services.cli` is the `expertfleet` command."""

from services.cli.main import main

main()
