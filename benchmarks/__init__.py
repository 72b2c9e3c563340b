"""Measurements, by hand: nothing here is a test. The project is found in the template's own directory."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "{{cookiecutter.project_slug}}"))
