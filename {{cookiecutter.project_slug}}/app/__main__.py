"""The command line: `python -m app worker`, `python -m app migrate`, `python -m app tasks list`."""

import sys

from app.settings import settings
from app.taskflow.cli import main
from app.tasks import task_manager

if __name__ == "__main__":
    task_manager.version = settings.version
    sys.exit(main(task_manager))
