"""Power cuts on a real file system: images of a disk, taken while a training runs on it.

    sudo python tests/bench/power.py --cuts 20

makes an ext4 file system in a file, trains on it, and copies the file at random moments. What ext4
has not written yet is not in a copy, as after a power cut. Every copy is mounted, its journal
replayed, and the training continued there with `--resume`: it must end with the same bytes as one
that nothing has disturbed. Needs Linux, mkfs.ext4 and the right to mount.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from minimore.data.world import World

RECIPES = {
    "plain": [],
    "streamed": ["--engine", "streamed", "--parameters", "bfloat16", "--moments", "int8"],
}


def run(*words, **options):
    return subprocess.run([str(word) for word in words], check=True, **options)


@contextmanager
def mounted(image, place):
    place.mkdir(exist_ok=True)
    run("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        run("umount", place)


def train(world, output, recipe, resume):
    """Begin a training of three sources with a checkpoint every third step."""
    words = [sys.executable, "-m", "minimore", "train", "--model", world / "model"]
    for name in ("ana", "ben", "cleo"):
        words += ["--source", f"{name}={world}/data/{name}.train.jsonl"]
    words += ["--batch-size", "6", "--save-steps", "3", "--learning-rate", "1e-3", *recipe]
    words += ["--output", output, *(["--resume"] if resume else [])]
    return subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process):
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(output[-1500:])


def content(output):
    """What must be equal to the bit."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    steps = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    names = ("model.safetensors", "config.json", "tokenizer.json", "checksums.json")
    return [(output / name).read_bytes() for name in names], steps


def cut(folder, name, recipe, cuts):
    """Take images of a training by one recipe, and continue from each; returns how many failed."""
    world, image = folder / "world", folder / "disk.img"
    with open(image, "wb") as file:
        file.truncate(96 << 20)
    run("mkfs.ext4", "-q", image)
    copies = []
    with mounted(image, folder / "mounted") as disk:
        output = disk / "run"
        began = time.monotonic()
        finished(train(world, output, recipe, resume=False))
        seconds, expected = time.monotonic() - began, content(output)
        while len(copies) < cuts:
            shutil.rmtree(output)
            run("sync")
            process = train(world, output, recipe, resume=False)
            began, last = time.monotonic(), 0.0
            for moment in sorted(random.uniform(0.5, 1.05) * seconds for _ in range(4)):
                time.sleep(max(0.0, moment - (time.monotonic() - began)))
                copies.append(folder / f"copy-{len(copies)}.img")
                shutil.copyfile(image, copies[-1])
                last = moment
            finished(process)
            assert last
    failed = 0
    for copy in copies[:cuts]:
        with mounted(copy, folder / "mounted") as disk:
            output = disk / "run"
            state = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
            try:
                finished(train(world, output, recipe, resume=True))
                same = content(output) == expected
            except RuntimeError as error:
                same = False
                print(error)
            failed += not same
            print(f"{name:9} {'same' if same else 'LOST'}  {' '.join(state)}", flush=True)
        copy.unlink()
    return failed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", type=int, default=20, help="for each of two recipes")
    options = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        World(annotators=("ana", "ben", "cleo"), train_pairs=(40,)).write(folder / "world")
        failed = sum(cut(folder, name, r, options.cuts) for name, r in RECIPES.items())
    print(f"{failed} of {2 * options.cuts} were lost")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
