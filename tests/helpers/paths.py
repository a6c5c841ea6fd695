"""Where things stand that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "src/efficientllm/demo/model"
SHARED = ROOT.parent / "shared"  # material beside the checkout; what reads it skips where it is not
