"""Run ``python -m tools.docs.pages`` with the same arguments."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.docs.pages import main

if __name__ == "__main__":
    main()
