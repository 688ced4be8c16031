"""Wrong numbers on one rank of two: NaN at a random place, and single bits of the weights that flip."""

import hashlib
import math
import random
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from clip_train.distributed.parallel import parallelize
from clip_train.distributed.world import World
from clip_train.errors import TrainingFailed
from clip_train.health.blame import blame
from clip_train.health.nonfinite import NonfiniteSteps
from clip_train.health.replicas import differing_ranks
from clip_train.loss.clip import ClipLoss
from clip_train.schema import OnNonfinite
from clip_train.step import TrainStep
from tests.gloo import run_on_ranks
from tests.standin import StandinCLIP, draw_batch
from tests.torture.row import Outcome, Row

CASES_PER_LAUNCH = 100
STEPS = 5
PAIRS = 8  # of each rank
WHERE = ("image", "text", "gradient")


class Unnamed:
    """A stream whose samples have no names."""

    def sample_names(self, slots: Any) -> list[str]:
        return [""] * len(slots)


class Trainer:
    """A small model and all it takes to train it on this rank."""

    def __init__(self, world: World, *, seed: int) -> None:
        self.world = world
        self.model = StandinCLIP(seed=seed)
        wrapped = parallelize(self.model, world=world)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        self.step = TrainStep(
            self.model, wrapped=wrapped, loss_fn=ClipLoss(world=world), optimizer=optimizer, world=world, seed=seed
        )

    def take(self, number: int) -> Any:
        """Take one step on this rank's rows; return its result and the batch."""
        whole = draw_batch(PAIRS * self.world.size, seed=number)
        first = self.world.rank * PAIRS
        batch = type(whole)(*(t[first : first + PAIRS] for t in whole))
        return self.step(batch, learning_rate=1e-2, step=number), batch

    def weights(self) -> str:
        """Return a hash of all weights, and check that they are finite."""
        tensors = [p.detach() for p in self.model.parameters()]
        assert all(bool(t.isfinite().all()) for t in tensors), "weights are not finite"
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def nan_on_a_rank(world: World, seed: int) -> Any:
    """Break a step on one rank; return what this rank decided, said and ended with, and what was broken."""
    draw = random.Random(seed)
    rank, step, where = draw.randrange(world.size), draw.randrange(STEPS), draw.choice(WHERE)
    value = draw.choice([math.nan, math.inf, -math.inf])
    policy = draw.choice(list(OnNonfinite))
    trainer = Trainer(world, seed=seed)

    def damage(tensor: torch.Tensor) -> torch.Tensor:
        broken = tensor.clone()
        broken.view(-1)[draw.randrange(tensor.numel())] = value
        return broken

    tower = trainer.model.visual if where == "image" else trainer.model.transformer
    said: list[str] = []
    decisions: list[Any] = []
    watch = NonfiniteSteps(
        policy,
        found=lambda number, result, slots: (
            said.append(
                blame(result, slots=slots, model=trainer.model, stream=Unnamed(), world=world)  # type: ignore[arg-type]
            )
            or f"step {number}"
        ),
    )
    try:
        for number in range(STEPS + 1):
            hook: Any = None
            if number == step and world.rank == rank:
                if where == "gradient":
                    hook = trainer.model.conv1.weight.register_hook(damage)
                else:
                    hook = tower.register_forward_hook(lambda module, inputs, output: damage(output))
            result, batch = trainer.take(number)
            if hook is not None:
                hook.remove()
            decisions.append((bool(result.skipped), watch.watch(result, slots=batch.slots, step=number)))
        decisions.append(watch.judge(last=True))
    except TrainingFailed as failure:
        decisions.append(str(failure))
    return decisions, said, trainer.weights(), (rank, step, where, policy.value)


def check_nan(ranks: list[Any]) -> None:
    """Check the answers of all ranks to one case."""
    decisions, said, weights, (rank, step, where, policy) = ranks[0]
    for other in ranks[1:]:
        assert other[:3] == (decisions, said, weights), "the ranks decided, said or ended differently"
    flags = [d[0] for d in decisions if isinstance(d, tuple)]
    assert [i for i, skipped in enumerate(flags) if skipped] == [step]
    assert len(said) == 1
    if where == "gradient":
        assert "backward pass" in said[0] and "gradient that is not finite: conv1.weight" in said[0], said
    else:
        assert f"rank {rank}: {where} features of" in said[0] and f"rank {1 - rank}:" not in said[0], said
    ended = isinstance(decisions[-1], str)
    assert ended == (policy == "stop")
    rewound = [d[1] for d in decisions if isinstance(d, tuple)]
    assert any(rewound) == (policy == "rewind")


def flipped_bit(world: World, seed: int) -> Any:
    """Flip a bit of one rank's weights and train on; return what the comparison says before and after."""
    draw = random.Random(seed)
    trainer = Trainer(world, seed=seed)
    trainer.take(0)
    before = differing_ranks(trainer.model, world=world)
    rank = draw.randrange(world.size)
    parameters = dict(trainer.model.named_parameters())
    name = draw.choice(sorted(parameters))
    element, bit = draw.randrange(parameters[name].numel()), draw.randrange(32)
    if world.rank == rank:
        parameters[name].data.view(torch.int32).view(-1)[element] ^= (1 << bit) - (1 << 32) * (bit == 31)
    at_once = differing_ranks(trainer.model, world=world)
    for number in range(1, 1 + draw.randrange(3)):
        trainer.take(number)
    later = differing_ranks(trainer.model, world=world)
    flat = [p.detach().numpy().tobytes() for p in trainer.model.parameters()]
    return before, at_once, later, hashlib.sha256(b"".join(flat)).hexdigest(), name


def check_flip(ranks: list[Any]) -> None:
    """Check the answers of all ranks to one case."""
    before, at_once, later, _, name = ranks[0]
    assert all(other[:3] == ranks[0][:3] for other in ranks)
    assert before is None
    assert at_once is not None and at_once.ranks == [0, 1] and at_once.tensor == name
    # A step may round the difference of a low bit away, and then the weights are equal again.
    assert (later is None) == (ranks[0][3] == ranks[1][3])


def cases_on_rank(world: World, case: Callable[[World, int], Any], seeds: list[int]) -> list[Any]:
    """Run cases on this rank; one that raises gives its traceback, and the others go on as all ranks raise alike."""
    answers: list[Any] = []
    for seed in seeds:
        try:
            answers.append(case(world, seed))
        except AssertionError:
            answers.append(traceback.format_exc(limit=-3))
    return answers


def on_two_ranks(
    case: Callable[[World, int], Any], check: Callable[[list[Any]], None]
) -> Callable[[int, int, int], Iterator[Outcome]]:
    """Make the function of a row whose cases run on two ranks, many to a launch."""

    def run(start: int, count: int, seed: int) -> Iterator[Outcome]:
        for first in range(start, start + count, CASES_PER_LAUNCH):
            seeds = [seed + i for i in range(first, min(first + CASES_PER_LAUNCH, start + count))]
            try:
                ranks = run_on_ranks(cases_on_rank, case, seeds, timeout=120 + 10 * len(seeds))
            except AssertionError as error:
                yield from (Outcome(s, f"no answer: {error}") for s in seeds)
                continue
            for number, s in enumerate(seeds):
                yield _judged(s, [answers[number] for answers in ranks], check)

    return run


def _judged(seed: int, answers: list[Any], check: Callable[[list[Any]], None]) -> Outcome:
    if broken := next((answer for answer in answers if isinstance(answer, str)), None):
        return Outcome(seed, broken)
    try:
        check(answers)
    except AssertionError:
        return Outcome(seed, f"{traceback.format_exc(limit=-2)}\n{answers}")
    return Outcome(seed)


ROWS = [
    Row(
        number=13,
        part="a",
        text="NaN or Inf on a random rank: equal decisions, weights finite and equal, the rank named",
        nightly=1000,
        run=on_two_ranks(nan_on_a_rank, check_nan),
    ),
    Row(
        number=13,
        part="b",
        text="a bit of one replica flips: found at the next comparison (every 500 steps)",
        nightly=100,
        run=on_two_ranks(flipped_bit, check_flip),
    ),
]
