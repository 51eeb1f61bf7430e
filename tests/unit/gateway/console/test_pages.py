from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.gateway.console.pages import ASSETS, load_pages
from tests.support.fake_shard import FakeShard, repeats
from tests.unit.gateway.http import client_of, error_of


async def test_the_page_and_all_it_names_are_served_without_a_key(model_folder: Path) -> None:
    shard = FakeShard(repeats([9]))
    async with client_of(shard, model_folder, api_keys="secret") as client:
        page = await client.get("/", headers={"accept": "text/html,*/*"})
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert (await client.get("/")).content == page.content
        named = re.findall(r'(?:src|href)="(console/[^"]+)"', page.text)
        assert named
        types = set()
        for name in named:
            asset = await client.get(f"/{name}")
            assert asset.status_code == 200, name
            assert asset.content == (ASSETS / name.removeprefix("console/")).read_bytes()
            types.add(asset.headers["content-type"])
    assert {"text/css; charset=utf-8", "text/javascript; charset=utf-8"} <= types


async def test_the_page_may_run_no_script_but_its_own_and_talk_to_nobody_else(
    model_folder: Path,
) -> None:
    async with client_of(FakeShard(repeats([9])), model_folder) as client:
        page = await client.get("/")
    policy = dict(
        part.split(" ", 1) for part in page.headers["content-security-policy"].split("; ")
    )
    assert (policy["default-src"], policy["frame-ancestors"]) == ("'none'", "'none'")
    assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in page.headers["content-security-policy"]
    inline = re.search(r"<script(?![^>]*\bsrc=)|\son[a-z]+=|\sstyle=|<style", page.text)
    assert inline is None, "the policy forbids what stands in the page"


async def test_an_asset_that_the_browser_has_is_not_sent_again(model_folder: Path) -> None:
    async with client_of(FakeShard(repeats([9])), model_folder) as client:
        first = await client.get("/")
        assert first.headers["cache-control"] == "no-cache"
        known = {"if-none-match": f'"other", W/{first.headers["etag"]}'}
        again = await client.get("/", headers=known)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        changed = await client.get("/", headers={"if-none-match": '"other"'})
        assert changed.content == first.content


@pytest.mark.parametrize(
    "path",
    [
        "/console/../pages.py",
        "/console/%2e%2e/pages.py",
        "/console/..%2fpages.py",
        "/console/%2fetc/passwd",
        "/console//etc/passwd",
        "/console/",
        "/console/no-such-file.js",
    ],
)
async def test_nothing_outside_the_folder_is_served(model_folder: Path, path: str) -> None:
    async with client_of(FakeShard(repeats([9])), model_folder) as client:
        response = await client.get(path)
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"


def test_files_of_unknown_kinds_are_no_assets(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    for name in ("index.html", "lib/app.js", "notes.py", ".secret"):
        (tmp_path / name).write_text("x")
    pages = load_pages(tmp_path)
    assert sorted(pages) == ["index.html", "lib/app.js"]
    assert pages["index.html"].etag == pages["lib/app.js"].etag
