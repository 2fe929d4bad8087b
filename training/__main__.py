"""`python -m training train …` is `foldserve train …`, and so are its other subcommands."""

import sys

from foldserve.cli import main

sys.exit(main(sys.argv[1:]))
