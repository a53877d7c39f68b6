"""The temperature that a run was given once it was trained: P(chosen is better) = sigmoid(m / T).

`evaluate --calibrate ... --store-temperature` fits it on held-out pairs and writes it beside the
model. `score` and `minimore.load` apply it. It changes no reward and no ranking.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from .checksums import read_checked_json, write_checked_json
from .options import InputError, require

TEMPERATURE = "temperature.json"


def store_temperature(run: Path, temperature: float, files: Mapping[str, str], pairs: int) -> Path:
    """Write the temperature of a run; files, pairs: on which it was fitted. Returns its file."""
    path = run / TEMPERATURE
    write_checked_json(path, {"temperature": temperature, "fitted_on": dict(files), "pairs": pairs})
    return path


def stored_temperature(run: Path) -> float:
    """The temperature of a run, 1 if it has none. Raises InputError for a file that is damaged."""
    path = run / TEMPERATURE
    if not path.exists():
        return 1.0
    try:
        temperature = read_checked_json(path).get("temperature")
    except InputError as error:
        raise InputError(f"{error}; remove it, and fit a temperature again") from None
    is_number = isinstance(temperature, float) and 0 < temperature < math.inf
    require(is_number, f"{path}: holds no positive temperature; remove it, and fit one again")
    assert isinstance(temperature, float)
    return temperature
