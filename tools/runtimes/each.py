"""What the scripts of Python runtimes share: several artefacts in one process. Needs numpy.

python run_RUNTIME.py ASKED.json FOLDER OUT.npz [FOLDER OUT.npz …]
"""

import json
import sys
import traceback
from pathlib import Path

import numpy as np


def each(outputs):
    """Write ``outputs(path, asked)``, arrays by name, for each artefact; in their place an ``error``, in one line."""
    source, *pairs = sys.argv[1:]
    asked = json.loads(Path(source).read_text())
    for path, target in zip(pairs[::2], pairs[1::2], strict=True):
        try:
            values = outputs(path, asked)
        except Exception as error:
            traceback.print_exc()
            values = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        np.savez(target, **values)
