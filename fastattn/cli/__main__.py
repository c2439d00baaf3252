"""`python -m fastattn.cli`, the same as `fastattn`."""

from fastattn.cli import main

main()
