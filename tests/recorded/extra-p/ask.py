"""Ask Extra-P for models of measurements, where it is installed: python ask.py IN.jsonl OUT.json

Writes its version, the function it found for each call path, and that function's values at every size measured and at
one beyond: twice the largest of each parameter.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

from extrap.fileio.file_reader.jsonlines_file_reader import read_jsonlines_file  # type: ignore[import-not-found]
from extrap.modelers.model_generator import ModelGenerator  # type: ignore[import-not-found]


def main(source: str, target: str) -> None:
    experiment = read_jsonlines_file(source)
    generator = ModelGenerator(experiment)
    generator.model_all()
    names = [parameter.name for parameter in experiment.parameters]
    told = {}
    for (callpath, metric), model in generator.models.items():
        measured = [tuple(each.coordinate) for each in experiment.measurements[callpath, metric]]
        beyond = tuple(2 * max(sizes) for sizes in zip(*measured, strict=True))
        function = model.hypothesis.function
        told[callpath.name] = {
            "function": function.to_string(*names),
            "values": [{"sizes": place, "step_s": float(function.evaluate(place))} for place in [*measured, beyond]],
        }
    with open(target, "w") as file:
        json.dump({"extrap": version("extrap"), "parameters": names, "models": told}, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
