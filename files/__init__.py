"""Files and folders: checkpoints, the layouts of published weights, videos and pictures. Imports nothing else of the project."""
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the project: weights/, assets/ and results/ are here
