"""What the wrong backends of the conformance tests have in common."""

from __future__ import annotations

import dataclasses
import json

ENTRIES = {}
"""By the name that each is registered as, below `installed` of conformance_site."""


class Disguise:
    """A backend under another name, with `answer` between its runtime and the caller."""

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        ENTRIES[f"wrong-{cls.__name__.lower()}"] = cls

    @property
    def name(self):
        return next(name for name, found in ENTRIES.items() if found is type(self))

    def capabilities(self):
        return dataclasses.replace(super().capabilities(), name=self.name, precisions=self.precisions)

    def lower(self, program, folder, options):
        artifact = super().lower(program, folder, options)
        manifest = json.loads((folder / "artifact.json").read_text())
        (folder / "artifact.json").write_text(json.dumps({**manifest, "target": self.name}))
        return dataclasses.replace(artifact, target=self.name)

    def load(self, artifact, options):
        return self.wrapped(super().load(artifact, options))

    def compile(self, model, options):
        return self.wrapped(super().compile(model, options))

    def wrapped(self, session):
        right = session.run
        session.run = lambda inputs: self.answer(session, right, inputs)
        return session

    def answer(self, session, right, inputs):
        return right(inputs)
