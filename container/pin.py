"""Writes the digests of the Dockerfile's base images into it: `python container/pin.py`.

Asks the registry, through the Docker engine, which digest every `ARG NAME_IMAGE=tag` has now.
"""

import re
import sys
from pathlib import Path

import docker
from docker.errors import DockerException

IMAGE = re.compile(r"^ARG (\w+)_IMAGE=(\S+)$", re.MULTILINE)


def pinned(text: str, client: docker.DockerClient) -> str:
    """The Dockerfile's text with every digest written in."""
    for name, tag in IMAGE.findall(text):
        digest = client.images.get_registry_data(tag).id
        text = re.sub(rf"^ARG {name}_DIGEST=\S*$", f"ARG {name}_DIGEST={digest}", text, flags=re.MULTILINE)
    return text


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "Dockerfile"
    try:
        text = pinned(path.read_text(encoding="utf-8"), docker.from_env())
    except DockerException as error:
        sys.exit(f"error: the digests cannot be asked for: {error}")
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    print("\n".join(line for line in text.splitlines() if re.match(r"ARG \w+_(IMAGE|DIGEST)=", line)))
