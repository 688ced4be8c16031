"""Changed data on a resumed run, and the end of an epoch, against a plain count of what each source showed."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from clip_train.data.config import DataConfig, Reader
from clip_train.data.order import SlotOrder, SourceOrder, dealt_before
from clip_train.distributed.world import World
from clip_train.errors import IntegrityError, UserError
from tests.data.made import ByteTokenizer, caption_of, numbered_shards, stream

BATCH = 50
SIZES = {"cats": 70, "dogs": 30, "birds": 40}


def _mixture(folder, *, weights: dict[str, float], **options):
    for name in weights:
        if not (folder / name).exists():
            numbered_shards(folder / name, [SIZES[name]])
    train = {name: {"shards": str(folder / name), "weight": weight} for name, weight in weights.items()}
    config = DataConfig(train=train, workers=0, lanes=3, window=8, **options)
    return config.stream(
        config.open_train(world=World()), world=World(), seed=3, global_batch_size=BATCH, image_size=16,
        tokenizer=ByteTokenizer(),
    )  # fmt: skip


def _sources_shown(training_stream, consumed: int, count: int) -> Counter:
    """How often each source came in some steps, by the order alone."""
    slots = np.arange(consumed, consumed + count * BATCH)
    sources, _ = training_stream.order.route(slots)
    return Counter(training_stream.sources[i].name for i in sources)


def test_slots_dealt_before_a_slot_are_those_of_the_order():
    order = SlotOrder([SourceOrder([n], name=str(n), seed=3) for n in (50, 7000, 1)], seed=3, start=77, segment=2)
    source, _ = order.route(np.arange(77, 77 + 9000))
    for slot in (77, 78, 4172, 4173, 8000, 9077):
        counted = [int((source[: slot - 77] == i).sum()) for i in range(3)]
        assert dealt_before(slot, quotas=order.quotas, start=77, seed=3, segment=2).tolist() == counted


def test_other_weights_begin_a_segment_in_which_every_source_keeps_its_place(tmp_path):
    first = _mixture(tmp_path, weights={"cats": 0.5, "dogs": 0.5})
    state = json.loads(json.dumps(first.state_dict(4 * BATCH)))
    with pytest.raises(IntegrityError, match=r"'cats' has another share .* data\.on_change=new_segment"):
        _mixture(tmp_path, weights={"cats": 0.8, "dogs": 0.2}).load_state_dict(state)
    second = _mixture(tmp_path, weights={"dogs": 0.2, "birds": 0.5, "cats": 0.3}, on_change="new_segment")
    second.load_state_dict(state)
    shown = _sources_shown(first, 0, 4)
    assert {s.name: int(b) for s, b in zip(second.sources, second.order.bases, strict=True)} == {**shown, "birds": 0}
    third = _mixture(tmp_path, weights={"cats": 1.0, "dogs": 1.0}, on_change="new_segment")
    third.load_state_dict(json.loads(json.dumps(second.state_dict(10 * BATCH))))
    shown += _sources_shown(second, 4 * BATCH, 6)
    assert dict(zip(("cats", "dogs"), third.order.bases.tolist(), strict=True)) == {
        n: shown[n] for n in ("cats", "dogs")
    }
    assert [s["start"] for s in third.state_dict(20 * BATCH)["segments"]] == [0, 4 * BATCH, 10 * BATCH]
    # The rows are those of the sources' own orders, from where each of them stood.
    (batch,) = itertools.islice(third.batches(10 * BATCH), 1)
    cats = sorted((int(g), caption_of(t)) for g, t in zip(batch.slots, batch.tokens, strict=True))
    source, _ = third.order.route(np.arange(10 * BATCH, 11 * BATCH))
    own = SourceOrder([70], name="cats", seed=3, lanes=3, window=8)
    _, expected = own.locate(shown["cats"] + np.arange((source == 0).sum()))
    assert [text for (_, text), i in zip(cats, source, strict=True) if i == 0] == [f"n {n}" for n in expected]


def test_a_resumed_segment_goes_on_where_it_was(tmp_path):
    first = _mixture(tmp_path, weights={"cats": 0.5, "dogs": 0.5})
    second = _mixture(tmp_path, weights={"cats": 0.8, "dogs": 0.2}, on_change="new_segment")
    second.load_state_dict(first.state_dict(4 * BATCH))
    state = json.loads(json.dumps(second.state_dict(7 * BATCH)))
    again = _mixture(tmp_path, weights={"cats": 0.8, "dogs": 0.2})
    again.load_state_dict(state)
    assert again.state_dict(7 * BATCH) == state
    (expected,) = itertools.islice(second.batches(7 * BATCH), 1)
    (batch,) = itertools.islice(again.batches(7 * BATCH), 1)
    assert batch.tokens.tolist() == expected.tokens.tolist() and batch.slots.tolist() == expected.slots.tolist()


def test_a_source_with_other_shards_begins_its_next_epoch(tmp_path):
    numbered_shards(tmp_path / "a", [20, 10])
    numbered_shards(tmp_path / "b", [20, 15])
    state = stream(tmp_path / "a", World()).state_dict(72)  # in the third epoch of 30
    longer = stream(tmp_path / "b", World(), on_change="new_segment")
    longer.load_state_dict(state)
    (base,) = longer.order.bases.tolist()
    assert base == 3 * 35
    rows = [int(caption_of(t).split()[1]) for b in itertools.islice(longer.batches(72), 4) for t in b.tokens]
    assert len(set(rows)) == 32


def test_an_epoch_that_drops_its_rest_ends_with_a_whole_batch_and_drops_others_each_time(tmp_path):
    numbered_shards(tmp_path, [20, 9])
    training_stream = stream(tmp_path, World(), epoch_end="drop_last")
    assert training_stream.num_samples == 24
    epochs = []
    batches = training_stream.batches(0)
    for _ in range(3):
        rows = [int(caption_of(t).split()[1]) for b in itertools.islice(batches, 3) for t in b.tokens]
        assert len(set(rows)) == 24
        epochs.append(set(rows))
    assert len(set.union(*epochs)) == 29
    state = training_stream.state_dict(24)
    stream(tmp_path, World(), epoch_end="drop_last").load_state_dict(state)
    with pytest.raises(IntegrityError, match=r"no whole batches of global_batch_size=7, which may not change"):
        stream(tmp_path, World(), epoch_end="drop_last", batch=7).load_state_dict(state)
    with pytest.raises(UserError, match=r"data\.epoch_end=drop_last needs data\.reader=indexed"):
        DataConfig(train=str(tmp_path), reader=Reader.streaming, num_samples=29, epoch_end="drop_last")
    with pytest.raises(UserError, match="drop_last needs one source"):
        _mixture(tmp_path / "m", weights={"cats": 1.0, "dogs": 1.0}, epoch_end="drop_last")
