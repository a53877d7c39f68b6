"""Files of a dataset from the hub: of one commit, checked, continued where they broke off.

    offers_of    the hub is asked for commit, checksum and size of what is not here yet
    fetch        <file>.<checksum>.incomplete grows; a killed download goes on where it ended
                 <file> is there when it is whole and its checksum is right

The files lie as in the repository, and beside them downloaded.json with their commit and checksums.
No token is sent: the sets are public, and a token belongs to nobody but the hub that gave it, which
need not be the address in HF_ENDPOINT.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get

from ...checksums import read_checked_json, write_checked_json
from ...files import blame, make_directory, one_line, to_disk
from ...options import InputError, require

RECEIPT = "downloaded.json"
READ_AT_ONCE = 1 << 24  # bytes
HEADERS = {"user-agent": "minimore", "accept-encoding": "identity"}  # a file as it is stored


@dataclass(frozen=True)
class Offer:
    """What the hub says of a file before it is fetched. size: bytes, if it says so.

    etag: a checksum, see `agrees`.
    """

    path: str
    url: str
    commit: str
    etag: str
    size: int | None

    @property
    def sha256(self) -> str | None:
        """The SHA-256 of the file, if the hub says it."""
        return self.etag if len(self.etag) == 64 else None


# ---- what is here --------------------------------------------------------------------------------


def read_receipt(directory: Path) -> dict[str, Any]:
    """What a directory of downloads says: {"commit", "files": {path: SHA-256}}."""
    path = directory / RECEIPT
    return read_checked_json(path) if path.is_file() else {"commit": None, "files": {}}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(READ_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def is_here(directory: Path, path: str, receipt: dict[str, Any]) -> bool:
    """Whether a file was downloaded, and is still as it was."""
    file, stored = directory / path, receipt["files"].get(path)
    return stored is not None and file.is_file() and sha256_of(file) == stored


# ---- from the hub --------------------------------------------------------------------------------


def offers_of(
    repository: str, paths: Sequence[str], commit: str | None, branch: str, directory: Path
) -> list[Offer]:
    """What is still to be fetched. commit: the one that is wanted; None: what the branch has now.

    The files of a directory are of one commit. Raises InputError where that cannot be.
    """
    receipt = read_receipt(directory)
    require(
        receipt["commit"] is None or commit in (None, receipt["commit"]),
        f"{directory}: holds files of commit {receipt['commit']}; expected {commit}: remove the"
        " directory, so that they are fetched again",
    )
    commit = commit or receipt["commit"]
    offers: list[Offer] = []
    for path in paths:
        if is_here(directory, path, receipt):
            continue
        offer = ask(repository, path, commit or branch)
        require(
            commit is None or offer.commit == commit,
            f"{offer.url}: the hub delivers commit {offer.commit}; expected {commit}",
        )
        commit = offer.commit
        offers.append(offer)
    return offers


def ask(repository: str, path: str, revision: str) -> Offer:
    """What the hub has under a path. Raises InputError if that is nothing that can be fetched."""
    url = hf_hub_url(repository, path, repo_type="dataset", revision=revision)
    try:
        metadata = get_hf_file_metadata(url, token=False)
    except Exception as error:  # its own errors, and those of the library that it downloads with
        blame(error)
        raise InputError(refusal(error, url, repository)) from None
    commit, etag = metadata.commit_hash, metadata.etag
    if not commit or not etag:
        raise InputError(
            f"{url}: answers without a commit or a checksum; expected a hub, so check HF_ENDPOINT"
        )
    return Offer(path, url, commit, etag, metadata.size)


def fetch(offer: Offer, directory: Path) -> None:
    """Download a file, or the rest of it, and put it in its place if it is what was offered."""
    path = directory / offer.path
    make_directory(path.parent)
    if not (path.is_file() and is_as_offered(path, offer)):
        mark = "".join(filter(str.isalnum, offer.etag))[:16]
        unfinished = path.with_name(f"{path.name}.{mark}.incomplete")
        go_on_with(unfinished, offer)
        if not is_as_offered(unfinished, offer):
            unfinished.unlink()
            raise InputError(
                f"{offer.url}: what came is not what the hub says it is (checksum {offer.etag});"
                " it was removed: give the same command again"
            )
        to_disk(unfinished)
        unfinished.replace(path)
        to_disk(path.parent)
    receipt = read_receipt(directory)
    receipt["commit"] = offer.commit
    receipt["files"][offer.path] = sha256_of(path)
    write_checked_json(directory / RECEIPT, receipt)


def go_on_with(unfinished: Path, offer: Offer) -> None:
    """Download what an unfinished file still lacks; a connection that is cut is made again."""
    try:
        with open(unfinished, "ab", buffering=0) as file:  # a kill loses nothing that came
            if offer.size is not None and file.tell() > offer.size:
                file.truncate(0)
            http_get(
                offer.url,
                file,
                resume_size=file.tell(),
                headers=dict(HEADERS),
                expected_size=offer.size,
            )
    except Exception as error:
        blame(error)
        held = unfinished.stat().st_size if unfinished.exists() else 0
        raise InputError(
            f"{offer.url}: broke off after {held:,} bytes ({one_line(error)}); give the same"
            " command again, and it goes on from there"
        ) from None


def is_as_offered(path: Path, offer: Offer) -> bool:
    """Whether a file has the size and the checksum that the hub gives.

    An ETag is the SHA-256 of a large file and git's name of a small one; others say nothing.
    """
    if offer.size is not None and path.stat().st_size != offer.size:
        return False
    if offer.sha256 is not None:
        return sha256_of(path) == offer.sha256
    if len(offer.etag) == 40:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == offer.etag
    return True


def refusal(error: Exception, url: str, repository: str) -> str:
    """What is said where the hub does not answer, or answers with an error."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"{url}: is not open to everybody (status {status}), and no token is sent from here;"
            f" accept its terms at the hub, get it by `hf download {repository} --repo-type"
            " dataset --local-dir PATH`, and give --from PATH"
        )
    if status == 404:
        return (
            f"{url}: the hub has no such file or revision (status 404); the set may have moved:"
            " get its files otherwise, and give --from PATH"
        )
    if status is not None:
        return f"{url}: the hub is in trouble (status {status}); give the same command again later"
    return (
        f"{url}: cannot be reached ({one_line(error)}); check the network and HF_ENDPOINT, or give"
        " --from PATH with the files of the repository"
    )
