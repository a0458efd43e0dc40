"""The conformance kit: a published suite that any registered backend can be put through.

`sartor conformance BACKEND` and `pytest --sartor-backend=BACKEND` run the same checks. Each check is one
sentence that holds or does not; see `checks`. docs/tutorial-backend.md says how to write a backend.
"""
