"""What a GPU does with the code: is it right, how fast is it, and does it take what was planned.

    python tests/bench/gpu.py --output gpu.json

takes at most 5 minutes on one H100. It goes through the stages below in their order, each in a
process of its own with a time limit of its own. What a stage has found is on the disk at once, in
gpu.jsonl; a stage that fails is recorded with its message, and the next one is tried. In the end
gpu.json has everything, and gpu.md has it as tables.

    facts       the device, and what its matrix products and copies reach
    attention   attention over segments against a masked softmax in float64
    steps       gradients, engines and storages against float64, plain ones and the CPU
    repeat      whether the same step gives the same bits twice
    command     the demo
    kills       trainings that are killed and resumed
    policy      a policy's gradients, what it writes, its fine-tuning
    align       a fine-tuning that is killed and resumed, samples and a comparison
    1.4B        steps on the shape of Pythia-1.4B: sharing, fusing and recipes one by one
    lean        the leanest of these recipes alone; "lean profile": where its time goes
    6.9B        the same for Pythia-6.9B, also as an 80 GB GPU
    24GB        Pythia-6.9B as a 24 GB GPU
    2.8B, 7B    the same for Pythia-2.8B and LLaMA2-7B
    peer        steps of transformers' reward model on the same pairs
    profile     where the time of a step goes on the GPU
    launches    where it goes on the CPU, which starts the GPU's work
    writing     the same for a policy that writes
    disk        writing and reading a checkpoint

`--stages facts attention` picks stages, `--seconds` bounds the whole. Without CUDA the same lines
run at tiny size in fp32, which checks this script and says nothing about speed. The exit code is 1
if a check did not pass.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpu_correct
import gpu_policy
import gpu_speed

from minimore.tables import MarkdownTable

STAGES = {  # name -> what it does, and its seconds
    "facts": (gpu_speed.facts, 60),
    "attention": (gpu_correct.attention, 60),
    "steps": (gpu_correct.steps, 120),
    "repeat": (gpu_correct.repeat, 60),
    "1.4B": (gpu_speed.pythia_1_4b, 120),
    "lean": (gpu_speed.lean, 90),
    "profile": (gpu_speed.profile, 60),
    "lean profile": (gpu_speed.profile_lean, 60),
    "launches": (gpu_speed.launches, 120),
    "6.9B": (gpu_speed.pythia_6_9b, 100),
    "24GB": (gpu_speed.within_24_gb, 240),
    "2.8B": (gpu_speed.pythia_2_8b, 60),
    "7B": (gpu_speed.llama_7b, 60),
    "peer": (gpu_speed.peer, 60),
    "command": (gpu_correct.command, 120),
    "kills": (gpu_correct.kills, 240),
    "policy": (gpu_policy.policy, 150),
    "writing": (gpu_policy.writing_by_function, 90),
    "align": (gpu_policy.chain, 150),
    "disk": (gpu_speed.disk, 60),
}


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--seconds", type=float, default=290, help="stop everything after so many seconds"
    )
    parser.add_argument(
        "--one-process", action="store_true", help="run all stages in this process, without limits"
    )
    parser.add_argument("--inside", choices=STAGES, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- a stage -------------------------------------------------------------------------------------


def run_inside(name, lines):
    """Run a stage in this process; every record it yields is appended to `lines` at once."""
    function, _ = STAGES[name]
    for record in function():
        append(lines, {"stage": name} | record)
        print(f"{name:10} {in_words(record)}", flush=True)


def run_stage(name, options, lines, began):
    """Run a stage in a process of its own, and record how it ended."""
    _, limit = STAGES[name]
    limit = min(limit, began + options.seconds - time.monotonic())
    if limit <= 0:
        append(lines, {"stage": name, "kind": "failure", "message": "not run: out of time"})
        return
    command = [sys.executable, __file__, "--inside", name, "--output", str(options.output)]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        try:
            code = subprocess.run(command, stderr=errors, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit:.0f} s"
        errors.seek(0)
        message = errors.read()[-1500:]
    if message:
        append(lines, {"stage": name, "kind": "warning", "message": message})
    if code:
        append(lines, {"stage": name, "kind": "failure", "message": f"{code}: {message}"})
        print(f"{name:10} FAILED ({code}): {message}", flush=True)
    seconds = time.monotonic() - started
    append(lines, {"stage": name, "kind": "time", "seconds": seconds})
    print(f"{name:10} {seconds:.0f} s\n", flush=True)


def append(lines, record):
    with lines.open("a") as file:
        file.write(json.dumps(record) + "\n")


def in_words(record):
    """A record as one line."""
    values = {key: value for key, value in record.items() if key not in ("kind", "seconds")}
    if record["kind"] == "check":
        word = "ok" if record["passed"] else "WRONG"
        return f"{record['name']:62} {record['error']:.1e} of {record['allowed']:.0e}  {word}"
    return ", ".join(
        f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )


# ---- the report ----------------------------------------------------------------------------------


def of_kind(records, kind):
    return [record for record in records if record["kind"] == kind]


def markdown(records):
    """The records as the engine's page wants them."""
    checks = of_kind(records, "check")
    passed = sum(check["passed"] for check in checks)
    facts = {fact["name"]: fact["value"] for fact in of_kind(records, "fact")}
    text = [
        f"{facts.get('device')}, torch {facts.get('torch')}, {time.strftime('%-d %B %Y')}, "
        f"`python tests/bench/gpu.py`; {passed} of {len(checks)} checks passed.",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        str(step_table(of_kind(records, "step"))),
        str(profile_table(of_kind(records, "profile"))),
        "\n".join(f"- {r['stage']} FAILED: {r['message']}" for r in of_kind(records, "failure")),
        "\n".join(f"- {r['stage']} said: {r['message']}" for r in of_kind(records, "warning")),
        "\n".join(f"- WRONG: {check['name']}" for check in checks if not check["passed"]),
    ]
    return "\n\n".join(part for part in text if part) + "\n"


def step_table(steps):
    table = MarkdownTable(
        "shape", "recipe", "pairs/s", "tokens/s", "executed", "useful", "peak GB", "planned", "host"
    )
    for r in steps:
        if "skipped" in r:
            table.add(r["shape"], r["recipe"], r["skipped"], *[""] * 6)
            continue
        table.add(
            r["shape"],
            r["recipe"],
            f"{r['pairs_per_second']:.1f}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['executed_share']:.1%}",
            f"{r['useful_share']:.1%}",
            f"{r['peak_gb']:.1f}",
            f"{r['planned_gb']:.1f}",
            f"{r['host_gb']:.1f}",
        )
    return table


def profile_table(rows):
    table = MarkdownTable("kernels", "ms of a step", "share")
    for row in rows:
        table.add(row["name"], f"{row['ms']:.1f}", f"{row['share']:.1%}")
    return table


def main():
    options = parse_options()
    lines = options.output.with_suffix(".jsonl")
    if options.inside:
        run_inside(options.inside, lines)
        return
    lines.unlink(missing_ok=True)
    began = time.monotonic()
    for name in options.stages:
        if options.one_process:
            run_inside(name, lines)
        else:
            run_stage(name, options, lines, began)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    options.output.write_text(json.dumps(records, indent=1))
    text = markdown(records)
    options.output.with_suffix(".md").write_text(text)
    print(f"{text}\n{time.monotonic() - began:.0f} s; {options.output}")
    wrong = [r for r in records if r["kind"] == "failure" or not r.get("passed", True)]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
