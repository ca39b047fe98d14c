"""Run by test_launch.py as one of several processes: `python rank_script.py FOLDER STATUS` leaves what it was told."""

import json
import os
import sys
from pathlib import Path

told = {name: os.environ.get(name) for name in ("LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")}
Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(told))
sys.exit(int(sys.argv[2]) if os.environ["RANK"] == "1" else 0)
