"""The systems that are compared: each a module with `async def session(database)` and a FastAPI `make_app(database)`."""
