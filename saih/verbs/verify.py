"""`saih verify`: whether a bundle is whole, and its page says what its results say."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = "example: saih verify cosmoflow.tar"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of the verb."""
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=Path, metavar="FILE.tar")


def verify(options: argparse.Namespace) -> int:
    """Check every byte of a bundle, and make its page and tables again from its results; exit status 1 if not equal."""
    import hashlib

    from saih import bundle as bundling

    wrong = bundling.verify(options.bundle)
    for each in wrong:
        print(f"WRONG    {' '.join(each.split())}")
    if not wrong:
        print(f"ok       {options.bundle}: every byte as packed; page and tables are what the results give")
        print(f"sha256   {hashlib.sha256(options.bundle.read_bytes()).hexdigest()}")
    return 1 if wrong else 0
