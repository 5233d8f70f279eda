"""A program, not a module to import: one worker of several, as `broker/supervisor.py` starts it.

It is started by its path, so that a worker always runs the code beside its parent's, wherever that was found.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    from broker.worker_process import main

    sys.exit(main())
