"""What the fleet runs: `celery -A app.worker worker`."""

from app.settings import secret, settings
from app.taskflow.delivery_worker import worker_app
from app.tasks import task_manager

url = secret(settings.delivery)
if url is None:
    raise SystemExit("TASKFLOW_DELIVERY: set it to the broker's URL")

task_manager.version = settings.version
app = worker_app(task_manager, url)
