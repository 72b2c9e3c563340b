"""The systems that are compared: modules with `session(database)` and a FastAPI `make_app(database)`, or with
`schedules(database, count)`."""
