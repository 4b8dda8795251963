"""`dvpo pull` from outside: folders, archives and the web, cut, hostile or changed."""

import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from dvpo.errors import StageError
from dvpo.files import sha256_tree, write_json
from reproduce.bundles import sources
from reproduce.bundles.manifest import manifest_bytes
from reproduce.bundles.pull import REGISTRY, pull


@dataclass
class Web:
    """A web server over a folder. `cut`: close the connection after so many bytes of a file, so many times."""

    root: Path
    url: str = ""
    ranges: bool = True
    cut: dict[str, list[int]] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def web(made: Path) -> Iterator[Web]:
    state = Web(made)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted))
            path = state.root / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data, start = path.read_bytes(), 0
            if wanted and state.ranges:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            cuts = state.cut.get(self.path, [])
            self.wfile.write(data[start : start + cuts.pop(0)] if cuts else data[start:])
            self.close_connection = True

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


class TestPull:
    def test_from_a_folder(self, dvpo: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert dvpo("pull", made).code == 0
        assert sha256_tree(tmp_path / "checkpoints" / "gvm-micro") == sha256_tree(made)
        assert dvpo("pull", made).code == 0
        (tmp_path / "checkpoints" / "gvm-micro" / "config.json").write_text("{}")
        assert dvpo("pull", made).code == 2

    def test_from_an_archive(self, dvpo: Any, run: Path, made: Path, tmp_path: Path, web: Web) -> None:
        archive = tmp_path / "bundle.tar"
        assert dvpo("release", run, "--out", archive).code == 0
        assert dvpo("pull", archive, "--out", tmp_path / "one").code == 0
        web.root, web.cut = tmp_path, {"/bundle.tar": [30_000]}
        assert dvpo("pull", f"{web.url}/bundle.tar", "--out", tmp_path / "two").code == 0
        assert sha256_tree(tmp_path / "one") == sha256_tree(tmp_path / "two") == sha256_tree(made)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle.tar", "one", "two"]

    def test_from_the_web_by_digest(self, dvpo: Any, signed: Path, tmp_path: Path, web: Web, keys: Any) -> None:
        web.root = signed
        digest = json.loads((signed / "manifest.json").read_text())["sha256"]
        out = tmp_path / "out"
        dvpo("pull", web.url, "--out", out, "--sha256", "0" * 64).differs("not the wanted")
        outcome = dvpo("pull", web.url, "--out", out, "--sha256", digest, "--public-key", keys("ours")[1])
        assert outcome.code == 0, outcome
        assert sha256_tree(out) == sha256_tree(signed)

    def test_a_cut_download_goes_on(self, dvpo: Any, made: Path, tmp_path: Path, web: Web) -> None:
        web.cut = {"/model.safetensors": [10_000] * sources.ATTEMPTS, "/manifest.json": [100]}
        out = tmp_path / "deep" / "out"
        first = dvpo("pull", web.url, "--out", out)
        first.differs("bytes; run the same command to go on")
        assert not out.exists()
        # A busy machine may lose a whole attempt: what counts is that nothing of what arrived is asked for again.
        have = int(re.search(r"after (\d+) bytes", first.err)[1])  # type: ignore[index]
        assert have in range(10_000, 10_000 * sources.ATTEMPTS + 1, 10_000)
        web.asked.clear()
        assert dvpo("pull", web.url, "--out", out).code == 0
        assert ("/model.safetensors", f"bytes={have}-") in web.asked
        assert not [name for name, _ in web.asked if name == "/config.json"]
        assert sha256_tree(out) == sha256_tree(made)
        assert [p.name for p in out.parent.iterdir()] == ["out"]

    def test_a_server_without_ranges(self, dvpo: Any, made: Path, tmp_path: Path, web: Web) -> None:
        web.ranges, web.cut = False, {"/model.safetensors": [10_000]}
        assert dvpo("pull", web.url, "--out", tmp_path / "out").code == 0
        assert sha256_tree(tmp_path / "out") == sha256_tree(made)

    def test_two_at_once(self, made: Path, tmp_path: Path, web: Web, monkeypatch: Any) -> None:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(pull, web.url, tmp_path / "out") for _ in range(2)]
        assert [done.result()[0] for done in both] == [tmp_path / "out"] * 2
        assert sha256_tree(tmp_path / "out") == sha256_tree(made)
        assert len([name for name, _ in web.asked if name == "/model.safetensors"]) == 1

    def test_another_file_than_promised(self, dvpo: Any, bundle: Path, tmp_path: Path, web: Web, flip: Any) -> None:
        web.root, out = bundle, tmp_path / "out"
        kept = (bundle / "config.json").read_bytes()
        flip(bundle / "config.json", 30)
        dvpo("pull", web.url, "--out", out).differs("config.json", "sha256")
        (bundle / "config.json").write_bytes(kept * 1000)
        dvpo("pull", web.url, "--out", out).differs("config.json", "larger")
        (bundle / "config.json").unlink()
        dvpo("pull", web.url, "--out", out).differs("config.json", "404")
        assert not out.exists()
        (bundle / "config.json").write_bytes(kept)
        assert dvpo("pull", web.url, "--out", out).code == 0

    def test_tensors_are_checked_before_it_is_there(self, dvpo: Any, bundle: Path, tmp_path: Path, reseal: Any) -> None:
        tensors = load_file(bundle / "model.safetensors")
        save_file({k: v for k, v in tensors.items() if "norm" not in k}, bundle / "model.safetensors")
        reseal(bundle)
        dvpo("pull", bundle, "--out", tmp_path / "out").differs("norm")
        assert [p.name for p in tmp_path.iterdir()] == ["bundle"]

    def test_too_large(self, dvpo: Any, bundle: Path, tmp_path: Path) -> None:
        limit = dvpo("pull", bundle, "--out", tmp_path / "out", "--max-gb", "0.0000001")
        assert (limit.code, "--max-gb" in limit.err) == (2, True)
        content = json.loads((bundle / "manifest.json").read_text())
        content["files"]["model.safetensors"]["size"] = 10**18
        (bundle / "manifest.json").write_bytes(manifest_bytes(content))
        room = dvpo("pull", bundle, "--out", tmp_path / "out", "--max-gb", "1e12")
        assert (room.code, "free" in room.err) == (2, True)

    def test_a_linked_file_in_a_folder(self, dvpo: Any, bundle: Path, tmp_path: Path) -> None:
        (bundle / "config.json").rename(tmp_path / "config.json")
        (bundle / "config.json").symlink_to(tmp_path / "config.json")
        dvpo("pull", bundle, "--out", tmp_path / "out").differs("config.json")

    @pytest.mark.parametrize(
        ("name", "kind", "word"),
        [
            ("../evil.json", tarfile.REGTYPE, "plain path"),
            ("/evil.json", tarfile.REGTYPE, "plain path"),
            ("config.json", tarfile.REGTYPE, "twice"),
            ("extra.json", tarfile.REGTYPE, "not in the manifest"),
            ("link.json", tarfile.SYMTYPE, "link"),
            ("hard.json", tarfile.LNKTYPE, "link"),
            ("device", tarfile.CHRTYPE, "device"),
            ("folder", tarfile.DIRTYPE, "folder"),
        ],
    )
    def test_a_hostile_archive(self, dvpo: Any, run: Path, tmp_path: Path, name: str, kind: bytes, word: str) -> None:
        archive = tmp_path / "a" / "bundle.tar"
        assert dvpo("release", run, "--out", archive).code == 0
        with tarfile.open(archive, "a") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO())
        dvpo("pull", archive, "--out", tmp_path / "b" / "out").differs(word)
        assert list((tmp_path / "b").iterdir()) == []
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]

    @pytest.mark.parametrize(
        ("headers", "word"),
        [
            ({"size": "9" * 30}, "not a whole"),
            ({"GNU.sparse.map": "a,b"}, "not a whole"),
            ({"GNU.sparse.size": "many"}, "not a whole"),
            ({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, "not a whole"),
            ({"GNU.sparse.map": "0,1000000", "GNU.sparse.size": "1000000"}, "sparse"),
            ({"path": "/etc/evil.json"}, "plain path"),
            ({"path": "./config.json"}, "plain path"),
        ],
    )
    def test_an_archive_with_hostile_headers(
        self, dvpo: Any, bundle: Path, tmp_path: Path, headers: dict[str, str], word: str
    ) -> None:
        archive = tmp_path / "bundle.tar"
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
            tar.add(bundle / "manifest.json", "manifest.json")
            info = tarfile.TarInfo("config.json")
            info.size, info.pax_headers = 10, headers
            tar.addfile(info, io.BytesIO(b"x" * 10))
        dvpo("pull", archive, "--out", tmp_path / "out").differs(word)
        assert not (tmp_path / "out").exists()

    def test_a_broken_archive(self, dvpo: Any, run: Path, tmp_path: Path) -> None:
        archive = tmp_path / "bundle.tar"
        assert dvpo("release", run, "--out", archive).code == 0
        os.truncate(archive, 20_000)
        dvpo("pull", archive, "--out", tmp_path / "out").differs("bundle.tar")
        archive.write_bytes(b"\x1f\x8b nonsense")
        dvpo("pull", archive, "--out", tmp_path / "out").differs("tar")

    def test_no_network(self, dvpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        dvpo("pull", "http://127.0.0.1:9", "--out", tmp_path / "out").differs("connection failed")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("http://127.0.0.1:9", "owner/name@v1"):
            outcome = dvpo("pull", name, "--out", tmp_path / "out")
            assert (outcome.code, "offline" in outcome.err) == (2, True)

    def test_a_hub_id_is_asked_for_at_its_revision(
        self, dvpo: Any, tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda hub_id, name, revision: f"{web.url}/{name}")
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        assert dvpo("pull", "owner/name@v1", "--out", tmp_path / "out").code == 0
        moving = dvpo("pull", "owner/name@main")
        assert (moving.code, "REVISION" in moving.err) == (2, True)

    def test_a_hub_id_that_begins_like_an_address(
        self, dvpo: Any, tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda hub_id, name, revision: f"{web.url}/{name}")
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        assert dvpo("pull", "httpx/model@v1", "--out", tmp_path / "out").code == 0

    def test_a_released_name_is_not_the_folder_here(
        self, dvpo: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        bundle.rename(tmp_path / "gvm-tiny")
        released = dvpo("pull", "gvm-tiny", "--json")
        assert json.loads(released.out)["sha256"] == json.loads(REGISTRY.read_text())["gvm-tiny"]["sha256"]
        assert "./gvm-tiny" in released.err
        assert json.loads(dvpo("pull", "./gvm-tiny", "--json").out)["name"] == "gvm-micro"

    def test_the_paper_s_checkpoints_are_not_released(self, dvpo: Any) -> None:
        outcome = dvpo("pull", "llama3-8b-base-gvm")
        assert (outcome.code, "not released" in outcome.err) == (2, True)
        unknown = dvpo("pull", "no-such-thing")
        assert (unknown.code, "no such folder" in unknown.err) == (2, True)

    def test_a_bundle_that_another_signed_is_not_taken(
        self, dvpo: Any, signed: Path, tmp_path: Path, keys: Any
    ) -> None:
        out = tmp_path / "out"
        dvpo("pull", signed, "--out", out, "--public-key", keys("theirs")[1]).differs("another key")
        assert not out.exists()

    def test_a_released_name_has_its_digest(self, dvpo: Any, bundle: Path, tmp_path: Path, monkeypatch: Any) -> None:
        write_json(tmp_path / "a" / "names.json", {"ours": {"source": "bundle", "sha256": "0" * 64}})
        monkeypatch.setattr("reproduce.bundles.pull.REGISTRY", tmp_path / "a" / "names.json")
        dvpo("pull", "ours", "--out", tmp_path / "out").differs("not the wanted")

    @pytest.mark.parametrize("word", ["1", "on", "YES", "true"])
    def test_offline_in_every_spelling(self, dvpo: Any, tmp_path: Path, monkeypatch: Any, word: str) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", word)
        assert "offline" in dvpo("pull", "http://127.0.0.1:9", "--out", tmp_path / "out").err

    def test_another_sound_bundle_is_not_this_one(self, dvpo: Any, run: Path, made: Path, tmp_path: Path) -> None:
        assert dvpo("release", run, "--stage", "seed0/sft", "--out", tmp_path / "out").code == 0
        other = dvpo("pull", made, "--out", tmp_path / "out")
        assert (other.code, "something else" in other.err) == (2, True)

    def test_a_linked_folder_that_leads_out(self, dvpo: Any, bundle: Path, tmp_path: Path) -> None:
        (bundle / "evaluation").rename(tmp_path / "moved")
        (bundle / "evaluation").symlink_to(tmp_path / "moved")
        dvpo("pull", bundle, "--out", tmp_path / "out").differs("leads out of the bundle")

    def test_too_many_files(self, dvpo: Any, bundle: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr("reproduce.bundles.manifest.MOST_FILES", 3)
        dvpo("verify", bundle).differs("at most 3")


def reply(code: int, content: bytes, **headers: str) -> httpx.Response:
    return httpx.Response(
        code, headers={k.replace("_", "-"): v for k, v in headers.items()}, stream=httpx.ByteStream(content)
    )


def answering(reply: Any, url: str = "https://a") -> sources.WebSource:
    """A source over a server that is a function of the request."""
    source = sources.WebSource(url)
    source.client = httpx.Client(transport=httpx.MockTransport(reply), follow_redirects=True)
    return source


class TestWeb:
    def test_no_way_from_https_to_http(self) -> None:
        away = httpx.Response(302, headers={"location": "http://b/x"})
        source = answering(lambda r: away if r.url.scheme == "https" else reply(200, b"x"))
        with pytest.raises(StageError, match="without encryption"):
            source.small("manifest.json", 100)

    def test_a_small_file_is_small(self) -> None:
        source = answering(lambda r: reply(200, b"x" * 10))
        assert source.small("manifest.json", 10) == b"x" * 10
        with pytest.raises(StageError, match="more than 9 bytes"):
            source.small("manifest.json", 9)

    def test_another_range_than_was_asked_for(self, tmp_path: Path) -> None:
        part = tmp_path / "part"
        part.write_bytes(b"01234")
        source = answering(lambda r: reply(206, b"01234", content_range="bytes 0-4/10"))
        with pytest.raises(StageError, match="another part"):
            source.fetch("x", 10, part)

    def test_a_part_that_the_server_has_no_more_of_is_fetched_anew(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
        part = tmp_path / "part"
        part.write_bytes(b"old and longer")
        source = answering(lambda r: reply(416 if "range" in r.headers else 200, b"new"))
        sources.fetch_url(source, "https://a/x.tar", None, part, 100)
        assert part.read_bytes() == b"new"

    def test_nothing_is_compressed_on_the_way(self) -> None:
        assert sources.WebSource("https://a").client.headers["accept-encoding"] == "identity"
