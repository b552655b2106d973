"""Survey the tiny op for targets; write records to a file and failures to stdout."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

from fivefold.kernels.offline import gather, records
from fivefold.kernels.offline.report import describe, survey
from fivefold.kernels.samples import OpSamples


def load(name: str, package: str) -> OpSamples:
    if name == "broken":
        raise ImportError("no such thing")
    from tiny.samples import SAMPLES

    return SAMPLES


if __name__ == "__main__":
    file, processes, *targets = sys.argv[1:]
    with patch.object(gather, "load", load):
        found, failures = survey([("tests", "broken"), ("tests", "tiny")], targets, int(processes))
    records.write(Path(file), found)
    print(json.dumps([[failure.expected, describe(failure)] for failure in failures]))
