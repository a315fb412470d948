"""Files and folders: checkpoints, published layouts of weights, videos, pictures."""
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the project: weights/, assets/, results/
