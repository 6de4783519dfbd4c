"""Stand-ins for a scheduler's commands: each says what a real one said, and notes how it was called."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

NOTE = """\
import json, os, sys
with open({calls!r}, "a") as file:
    print(json.dumps({{"words": [{name!r}, *sys.argv[1:]], "environment": dict(os.environ)}}), file=file)
"""


class Commands:
    """A folder to put first on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._calls = folder, folder / "calls"
        folder.mkdir(parents=True)

    def add(self, name: str, output: str = "", complaint: str = "", status: int = 0, when: str = "") -> None:
        """A command that says this; where `when` is given, only if it is one of its words."""
        says = [f"printf %s {shlex.quote(output)}", f"printf %s {shlex.quote(complaint)} >&2", f"exit {status}"]
        path = self.folder / name
        if not path.exists():
            note = shlex.join([sys.executable, "-c", NOTE.format(calls=str(self._calls), name=name)])
            path.write_text(f'#!/bin/bash\n{note} "$@"\n')
            path.chmod(0o755)
        lines = says if not when else [f'if [[ " $* " == *" {when} "* ]]; then', *says, "fi"]
        path.write_text(path.read_text() + "\n".join(lines) + "\n")

    def calls(self) -> list[list[str]]:
        """The words of each call so far."""
        return [call["words"] for call in self._read()]

    def environment(self) -> dict[str, str]:
        """That of the last call."""
        return dict(self._read()[-1]["environment"])

    def _read(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self._calls.read_text().splitlines()] if self._calls.exists() else []
