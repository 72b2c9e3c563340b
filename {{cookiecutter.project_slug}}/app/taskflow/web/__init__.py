"""The system over HTTP: a JSON API, a dashboard of server-rendered pages, a live stream of what changed.

Owns how tasks look from outside. It asks `TaskStore` for everything and keeps nothing of its own but sessions.
`admin.py` puts the routers together.
"""
