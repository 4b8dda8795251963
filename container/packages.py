"""Prints every installed package and its version as JSON."""

import importlib.metadata
import json

found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
print(json.dumps(dict(sorted(found.items(), key=lambda item: item[0].lower())), indent=1))
