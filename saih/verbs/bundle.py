"""`saih bundle`: results and all that they rest on, in one archive."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = "example: saih bundle results/reference/cosmoflow-cpu.h5 -o cosmoflow.tar"
JOBS = Path("jobs")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of the verb."""
    parser.epilog = EPILOG
    parser.add_argument("results", type=Path, metavar="RESULTS.h5")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.tar")


def bundle(options: argparse.Namespace) -> int:
    """Pack results, page, tables, environment, scripts, logs and raw samples with their checksums into one archive."""
    from saih import bundle as bundling

    digest = bundling.bundle(options.results, JOBS, options.output)
    print(options.output)
    print(f"sha256   {digest}")
    return 0
