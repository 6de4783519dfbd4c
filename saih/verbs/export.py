"""`saih export`: a results file in the formats of others."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = ("csv", "json", "extrap", "mlperf", "worksheet")
EPILOG = "example: saih export results/reference/cosmoflow-cpu.h5 --to worksheet -o cosmoflow.tsv"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of the verb."""
    parser.epilog = EPILOG
    parser.add_argument("results", type=Path, metavar="RESULTS.h5")
    parser.add_argument("--to", required=True, choices=FORMATS, help="which format")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: the terminal")


def export(options: argparse.Namespace) -> int:
    """Write results as CSV, JSON, Extra-P lines, MLPerf log lines, or a worksheet to paste into a spreadsheet."""
    from saih import export as formats
    from saih.files import write_atomic

    text = formats.export(options.results, options.to)
    if options.output is None:
        print(text, end="")
        return 0
    write_atomic(options.output, lambda file: file.write(text.encode()))
    print(options.output)
    return 0
