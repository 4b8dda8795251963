"""The page at /docs: the OpenAPI document as plain HTML, with examples to paste. It works without a network."""

import json
import shlex
from typing import Any

from jinja2 import Environment, StrictUndefined

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ info.title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
pre { background: #f3f3f3; padding: .75rem; overflow-x: auto; white-space: pre-wrap; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25rem .5rem; vertical-align: top;
border-bottom: 1px solid #ddd; } h2 { margin-top: 2.5rem; } .about { background: none; padding: 0; font: inherit; }
</style></head><body>
<h1>{{ info.title }} {{ info.version }}</h1>
<pre class="about">{{ info.description }}</pre>
<p>The same for programs: <a href="openapi.json">openapi.json</a></p>
{% for route in routes %}
<h2 id="{{ route.path }}">{{ route.method }} {{ route.path }}</h2>
<p>{{ route.summary }}. {{ route.description }}</p>
<pre>{{ route.example }}</pre>
{% if route.fields %}<table><thead><tr><th>Field</th><th>Form</th><th></th></tr></thead><tbody>
{% for name, form, about in route.fields %}<tr><td>{{ name }}</td><td>{{ form }}</td><td>{{ about }}</td></tr>
{% endfor %}</tbody></table>{% endif %}
<table><thead><tr><th>Status</th><th></th></tr></thead><tbody>
{% for code, about in route.replies %}<tr><td>{{ code }}</td><td>{{ about }}</td></tr>
{% endfor %}</tbody></table>
{% endfor %}
{% for name, fields in forms %}<h2 id="{{ name }}">{{ name }}</h2>
<table><thead><tr><th>Field</th><th>Form</th><th></th></tr></thead><tbody>
{% for field, form, about in fields %}<tr><td>{{ field }}</td><td>{{ form }}</td><td>{{ about }}</td></tr>
{% endfor %}</tbody></table>
{% endfor %}
</body></html>
"""


def page(document: dict[str, Any]) -> str:
    """The OpenAPI document as HTML."""
    schemas: dict[str, Any] = document["components"]["schemas"]
    routes, taken = [], set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            name = _body(operation)
            taken.add(name)
            example = schemas[name]["examples"][0] if name else None
            routes.append(
                {
                    "method": method.upper(),
                    "path": path,
                    "summary": operation["summary"],
                    "description": operation.get("description", ""),
                    "example": _curl(path, example),
                    "fields": _fields(schemas[name]) if name else [],
                    "replies": [(code, r["description"]) for code, r in sorted(operation["responses"].items())],
                }
            )
    forms = [(name, _fields(schema)) for name, schema in schemas.items() if name not in taken]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_PAGE).render(info=document["info"], routes=routes, forms=forms)


def _body(operation: dict[str, Any]) -> str | None:
    body = operation.get("requestBody")
    return body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2] if body else None


def _curl(path: str, example: Any) -> str:
    if example is None:
        return f"curl localhost:8000{path}"
    body = shlex.quote(json.dumps(example, ensure_ascii=False))
    return f"curl localhost:8000{path} -H 'content-type: application/json' -d {body}"


def _fields(schema: dict[str, Any]) -> list[tuple[str, str, str]]:
    needed = schema.get("required", [])
    return [
        (name, _form(field) + ("" if name in needed else ", optional"), field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    ]


def _form(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_form(choice) for choice in schema["anyOf"] if choice.get("type") != "null")
    if "enum" in schema:
        return " | ".join(map(json.dumps, schema["enum"]))
    if "const" in schema:
        return json.dumps(schema["const"])
    if schema.get("type") == "array":
        return f"list of ({_form(schema.get('items', {}))})"
    return str(schema.get("type", "anything"))
