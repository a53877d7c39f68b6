"""minimore data get: a public set of preferences by its name, as pairs one can trust.

    the hub, or --from    files of one commit, compared with what is known of them
    records               to house records (convert.py)
    two files             DIR/NAME.train.jsonl and DIR/NAME.test.jsonl, which share no prompt
    a manifest            DIR/NAME.json: licence, commit, counts, checksums of what went in and out

Everything is written beside its place and put there at the end, the manifest last. The same command
writes the same bytes, also after a kill. Where its manifest is, it looks whether all is as it was.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checksums import file_checksum, write_checked_json, write_checksum_beside
from ...files import locked, make_directory, to_disk
from ...options import COUNT, Range, check_ranges, option, require
from ...tables import Table
from ..records import json_line
from .changes import Input, changes_of_file, changes_of_records, changes_since, input_of
from .download import fetch, offers_of, read_receipt, sha256_of
from .manifest import is_complete, read_manifest
from .parts import Conversion, Counts, Part, sampled
from .sources import SETS, File, PublicSet

SHOWN_CHANGES = 3
DOWNLOADS = "downloads"  # in the output directory: what came from the hub, by repository


def list_of_sets() -> Table:
    """The public sets by name, with records, size and licence as far as they are known."""
    header = ("name", "records, train + test", "bytes", "repository", "licence")
    table = Table(*header, left=header[3:])
    for name, public_set in SETS.items():
        records = [public_set.train_records, public_set.test_records]
        known = [f"{count:,}" for count in records if count is not None]
        sizes = [file.size for file in public_set.files]
        size = "not known" if None in sizes else f"{sum(size or 0 for size in sizes):,}"
        shown = " + ".join(known) or "not known"
        table.add(name, shown, size, public_set.repository, public_set.licence)
    return table


@dataclass(frozen=True, kw_only=True)
class GetOptions:
    """What `minimore data get` takes."""

    name: str = option(value="NAME", choices=tuple(SETS), help="the public set", positional=True)
    output: str = option(value="DIR", help="where NAME.train.jsonl and NAME.test.jsonl are written")
    from_: str | None = option(
        None,
        value="PATH",
        help="a directory with the files of the repository, instead of the hub",
    )
    pairs: int | None = option(
        None, within=COUNT, help="resample the training pairs to this many (the paper: 40000)"
    )
    test_pairs: int | None = option(
        None, within=COUNT, help="sample this many of the test pairs (the paper's summarize: 2000)"
    )
    seed: int = option(0, within=Range(least=0), help="of both samples")
    test_only: bool = option(False, help="write the test file alone")
    accept_change: bool = option(
        False, help="take files that are not what is known of the set; the manifest will say so"
    )
    list: bool = option(False, help="print the sets, and leave", prints=list_of_sets)


def get(options: GetOptions) -> None:
    """Write the files of a set and their manifest, unless they are there already."""
    check_ranges(options)
    require(
        options.pairs is None or not options.test_only,
        "--pairs is of training pairs; give --test-pairs beside --test-only",
    )
    public_set, output = SETS[options.name], Path(options.output)
    print(description(options.name, public_set), flush=True)
    make_directory(output)
    lock = locked(output, f"--output {output}: another data get is writing here; wait for it")
    try:
        path = output / f"{options.name}.json"
        manifest = read_manifest(path, request_of(options)) if path.is_file() else None
        if manifest is None or not is_complete(manifest, output):
            manifest = get_in(options, public_set, output, manifest)
        print(summary(manifest, public_set))
    finally:
        if lock is not None:
            os.close(lock)


def get_in(
    options: GetOptions, public_set: PublicSet, output: Path, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """Obtain, check, convert, put in place. earlier: a manifest whose files are gone."""
    files = public_set.files
    if options.test_only and public_set.test:
        files = public_set.test
    inputs, commit = obtain(options, public_set, files, output, earlier)
    changes = [
        change for here in inputs for change in changes_of_file(here.file, here.size, here.sha256)
    ]
    changes += changes_since(earlier, inputs) if earlier else []
    refuse_changes(options, changes)
    conversion = Conversion(public_set, inputs)
    with unfinished_removed(options.name, output):
        outputs = write_parts(options, conversion, output)
        changes += changes_of_records(public_set, conversion.records)
        refuse_changes(options, changes)
        put_in_place(outputs, output)
    manifest = {
        "name": options.name,
        "request": request_of(options),
        "repository": public_set.repository,
        "commit": commit,
        "licence": public_set.licence,
        "split": "official" if public_set.test else "by opening",
        "inputs": {here.file.path: described(here, conversion) for here in inputs},
        "changes": changes,
        "outputs": outputs,
        "left_out": conversion.left_out,
    }
    write_checked_json(output / f"{options.name}.json", manifest)
    return manifest


def described(here: Input, conversion: Conversion) -> dict[str, Any]:
    """What the manifest says of a file that went in."""
    return {
        "sha256": here.sha256,
        "bytes": here.size,
        "records": conversion.records[here.file.path],
    }


# ---- what is said --------------------------------------------------------------------------------


def description(name: str, public_set: PublicSet) -> str:
    """What is known of a set before anything is fetched."""
    sizes = [file.size for file in public_set.files if file.size is not None]
    count = len(public_set.files)
    size = f"{sum(sizes):,} bytes" if sizes else "said by the hub before the download"
    if 0 < len(sizes) < count:
        size += f" in {len(sizes)} of {count} files; of the others it is not known beforehand"
    commit = public_set.revision or f"not pinned: what {public_set.branch} has at the first time"
    lines = [
        f"{name}: {public_set.about}",
        f"  repository  {public_set.repository}, {count} file{'s' * (count > 1)}",
        f"  commit      {commit}",
        f"  licence     {public_set.licence}",
        f"  size        {size}",
    ]
    if public_set.paper:
        lines.append("  paper       {:,} training and {:,} test pairs".format(*public_set.paper))
    return "\n".join([*lines, *(f"  note        {note}" for note in public_set.notes)])


def summary(manifest: dict[str, Any], public_set: PublicSet) -> str:
    """What the files hold, and what was left out."""
    paper = dict(zip(("train", "test"), public_set.paper or (None, None)))
    table = Table("file", "pairs", "prompts", "label ties", "records", "paper's pairs")
    for part, values in manifest["outputs"].items():
        counts = (values[key] for key in ("pairs", "prompts", "ties", "records"))
        table.add(values["file"], *counts, paper[part])
    reasons = [f"{count:,} {reason}" for reason, count in manifest["left_out"].items() if count]
    lines = [str(table), f"left out: {', '.join(reasons) or 'nothing'}"]
    return "\n".join([*lines, *(f"accepted: {change}" for change in manifest["changes"])])


def refuse_changes(options: GetOptions, changes: list[str]) -> None:
    """Refuse a set that is not what it was, unless that is accepted."""
    shown = changes[:SHOWN_CHANGES]
    if len(changes) > len(shown):
        shown.append(f"and {len(changes) - len(shown)} more")
    require(
        not changes or options.accept_change,
        f"{options.name} is not what it was: {'; '.join(shown)}; give --accept-change to take it as"
        " it is",
    )


# ---- from the hub or from here -------------------------------------------------------------------


def obtain(
    options: GetOptions,
    public_set: PublicSet,
    files: tuple[File, ...],
    output: Path,
    earlier: dict[str, Any] | None,
) -> tuple[list[Input], str | None]:
    """The files of a set, and their commit if it is known."""
    if options.from_ is not None:
        directory = Path(options.from_)
        require_files(directory, public_set, files)
    else:
        directory = output / DOWNLOADS / public_set.repository
        commit = public_set.revision or (earlier or {}).get("commit")
        download(options, public_set, files, commit, directory)
    inputs = [input_of(file, directory / file.path) for file in files]
    return inputs, read_receipt(directory)["commit"]


def require_files(directory: Path, public_set: PublicSet, files: tuple[File, ...]) -> None:
    """Refuse a directory that lacks files of the set."""
    require(directory.is_dir(), f"--from {directory}: no such directory")
    missing = [file.path for file in files if not (directory / file.path).is_file()]
    has_test = public_set.test and not any(file.path in missing for file in public_set.test)
    hint = ", or --test-only for the test files alone" if has_test else ""
    require(
        not missing,
        f"--from {directory}: has no {' and no '.join(missing[:2])}; expected the files of"
        f" {public_set.repository} as they lie there{hint}",
    )


def download(
    options: GetOptions,
    public_set: PublicSet,
    files: tuple[File, ...],
    commit: str | None,
    directory: Path,
) -> None:
    """Bring from the hub what is not here yet, unless the hub's is not what is known of it."""
    by_path = {file.path: file for file in files}
    repository, branch = public_set.repository, public_set.branch
    offers = offers_of(repository, tuple(by_path), commit, branch, directory)
    for offer in offers:
        known = by_path[offer.path]
        refuse_changes(options, changes_of_file(known, offer.size, offer.sha256))
    if offers:
        size = sum(offer.size or 0 for offer in offers)
        print(f"  download    {len(offers)} files, {size:,} bytes, to {directory}", flush=True)
    for offer in offers:
        fetch(offer, directory)


# ---- the two files -------------------------------------------------------------------------------


def write_parts(options: GetOptions, conversion: Conversion, output: Path) -> dict[str, Any]:
    """Write the parts of a set under names of their own; return what is in them, by part."""
    outputs = {"test": write_part(conversion.test, options.test_pairs, options, "test", output)}
    if not options.test_only:
        outputs["train"] = write_part(conversion.train, options.pairs, options, "train", output)
    return outputs


def write_part(
    part: Part, count: int | None, options: GetOptions, name: str, output: Path
) -> dict[str, Any]:
    """Write a part, or a sample of its pairs; return the file's name, checksum and counts."""
    records = part()
    if count is not None:
        records = sampled(part, count, options.seed, may_repeat=name == "train")
    path = output / f"{options.name}.{name}.jsonl"
    counts = Counts()
    with open(unfinished(path), "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            counts.add(record)
            file.write(json_line(record, options.name) + "\n")
    to_disk(unfinished(path))
    return {
        "file": path.name,
        "sha256": sha256_of(unfinished(path)),
        "pairs": counts.pairs,
        "prompts": len(counts.prompts),
        "ties": counts.ties,
        "records": counts.records,
    }


def unfinished(path: Path) -> Path:
    """The name of a file until it is whole."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def unfinished_removed(name: str, output: Path) -> Iterator[None]:
    """At the end nothing unfinished of a set is left."""
    try:
        yield
    finally:
        for part in ("test", "train"):
            unfinished(output / f"{name}.{part}.jsonl").unlink(missing_ok=True)


def put_in_place(outputs: dict[str, Any], output: Path) -> None:
    """Give whole files their names. Raises InputError if another file has one."""
    for values in outputs.values():
        path = output / values["file"]
        require(
            not path.exists() or sha256_of(path) == values["sha256"],
            f"{path}: exists already, and is not what this command writes; choose another --output,"
            " or remove it",
        )
    for values in outputs.values():
        path = output / values["file"]
        write_checksum_beside(path, file_checksum(unfinished(path)))
        unfinished(path).replace(path)
    to_disk(output)


def request_of(options: GetOptions) -> dict[str, Any]:
    """The options on which the bytes depend."""
    return {
        "pairs": options.pairs,
        "test_pairs": options.test_pairs,
        "seed": options.seed,
        "test_only": options.test_only,
    }
