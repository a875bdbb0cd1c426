"""A server of the OpenAI API over `Engine.service`: one engine, whose thread decodes, behind an ASGI application (extra `serve`).

`fields.py` reads requests (one table of fields), `answers.py` writes answers, `runner.py` is the engine's thread, `app.py` the
routes.
"""
