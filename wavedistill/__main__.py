"""`python -m wavedistill`, and with it `torchrun -m wavedistill`, which trains in several processes."""

from wavedistill.cli import main

main()
