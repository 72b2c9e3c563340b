"""Serves one contestant's sign-up route: `python -m benchmarks.server CONTESTANT DATABASE PORT`."""

from __future__ import annotations

import gc
import importlib
import sys

import uvicorn


def main() -> None:
    name, database, port = sys.argv[1:]
    app = importlib.import_module(f"benchmarks.contestants.{name}").make_app(database)
    gc.freeze()  # as the template's main.py does, for whoever is measured
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
