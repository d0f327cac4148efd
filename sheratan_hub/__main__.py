"""Lets `python -m sheratan_hub` be the same as the console script `sheratan-hub`."""

from sheratan_hub.cli import main

main()
