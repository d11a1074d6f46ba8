"""`python -m trivium.cli`, as torchrun starts it."""

from trivium.cli import main

main()
