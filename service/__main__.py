"""`python -m service …` is `foldserve serve …`."""

import sys

from foldserve.cli import main

sys.exit(main(["serve", *sys.argv[1:]]))
