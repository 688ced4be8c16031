"""Misspelt config keys, drawn at random: one slip of a finger in one part of a key."""

import random
import string
import time
from collections.abc import Sequence

from clip_train.config_keys import known_keys
from clip_train.schema import TrainConfig
from tests.catalogue.commands import clip_train

MAX_SECONDS = 2.0
VALID = ("steps=500", "data.train=nowhere")


def draw(seed: int, keys: Sequence[str]) -> tuple[str, str]:
    """Return a key and how it was misspelt: a letter left out, doubled, exchanged, swapped or added."""
    rng = random.Random(seed)
    known = set(keys)
    while True:
        key = rng.choice(keys)
        parts = key.split(".")
        number = rng.choice([i for i, part in enumerate(parts) if part != "val" and len(part) > 1] or [0])
        part = parts[number]
        at = rng.randrange(len(part))
        letter = rng.choice(string.ascii_lowercase)
        slips = [
            part[:at] + part[at + 1 :],
            part[:at] + part[at] + part[at:],
            part[:at] + letter + part[at + 1 :],
            part[:at] + letter + part[at:],
            part[: max(at - 1, 0)] + part[max(at - 1, 0) : at + 1][::-1] + part[at + 1 :],
        ]
        wrong = ".".join([*parts[:number], rng.choice(slips), *parts[number + 1 :]])
        sections = {name.rpartition(".")[0] for name in known}
        if wrong not in known and wrong not in sections and wrong.strip("."):
            return key, wrong


def all_keys() -> list[str]:
    """Return every key of a training run."""
    return sorted(key.replace("evaluation.NAME", "evaluation.val") for key in known_keys(TrainConfig))


def misspell(seed: int) -> bool:
    """Give one misspelt key to the command line; return whether the right one was named.

    Raises:
        AssertionError: it was not refused in one line, or not within two seconds.
    """
    key, wrong = draw(seed, all_keys())
    started = time.process_time()
    done = clip_train("train", *VALID, f"{wrong}=1")
    seconds = time.process_time() - started
    done.refused(2, wrong)
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert seconds < MAX_SECONDS, f"{wrong}: {seconds:.2f} s"
    return f"did you mean '{key}'" in done.err
