import torch

from clip_train.loss.captions import caption_ids


def test_ids_follow_captions_and_not_the_context_length():
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    tokens[0, :4] = tokens[1, :4] = torch.tensor([49406, 320, 1125, 49407])
    tokens[2, :4] = torch.tensor([49406, 1125, 320, 49407])
    ids = caption_ids(tokens)
    assert ids[0] == ids[1] != ids[2]
    assert torch.equal(ids, caption_ids(tokens[:, :5]))


def test_a_hundred_thousand_close_captions_have_distinct_ids():
    number = torch.arange(100_000)
    tokens = torch.stack(
        [torch.full_like(number, 49406), number % 317, number // 317, torch.full_like(number, 49407)], 1
    )
    assert caption_ids(tokens).unique().numel() == 100_000


def test_ids_equal_a_sum_in_unbounded_integers():
    mask = 2**64 - 1

    def mixed(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    tokens = [49406, 17, 0, 3, 49407]
    want = sum(t * (mixed(((i + 1) * 0x9E3779B97F4A7C15) & mask) | 1) for i, t in enumerate(tokens)) & mask
    assert caption_ids(torch.tensor([tokens])).item() & mask == want
