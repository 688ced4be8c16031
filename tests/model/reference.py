"""CLIP written out from the paper and the state-dict keys, with a convolution, full padding and an explicit mask."""

import torch
import torch.nn.functional as F

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalized(pixels):
    """uint8 [B, H, W, 3] -> float64 [B, 3, H, W]."""
    x = pixels.double().permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[:, None, None]


def encode_image(weights, images, *, heads, quick_gelu=False):
    """images: normalised [B, 3, H, W] -> [B, D], not normalised."""
    kernel = weights["visual.conv1.weight"]
    x = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([weights["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(weights, "visual.ln_pre", x + weights["visual.positional_embedding"])
    x = transformer(weights, "visual.transformer", x, heads=heads, quick_gelu=quick_gelu, mask=None)
    return norm(weights, "visual.ln_post", x[:, 0]) @ weights["visual.proj"]


def encode_text(weights, tokens, *, heads, quick_gelu=False):
    """tokens: int64 [B, L] with L the whole context -> [B, D], not normalised."""
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"]
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
    x = transformer(weights, "transformer", x, heads=heads, quick_gelu=quick_gelu, mask=mask)
    x = norm(weights, "ln_final", x)
    return x[torch.arange(len(x)), tokens.argmax(1)] @ weights["text_projection"]


def norm(weights, key, x):
    return F.layer_norm(x, x.shape[-1:], weights[f"{key}.weight"], weights[f"{key}.bias"], 1e-5)


def transformer(weights, prefix, x, *, heads, quick_gelu, mask):
    layers = len(
        {key.split(".resblocks.")[1].split(".")[0] for key in weights if key.startswith(f"{prefix}.resblocks.")}
    )
    for i in range(layers):
        w = {k.removeprefix(f"{prefix}.resblocks.{i}."): v for k, v in weights.items()}
        y = norm(w, "ln_1", x).transpose(0, 1)
        attended, _ = F.multi_head_attention_forward(
            y, y, y, x.shape[-1], heads, w["attn.in_proj_weight"], w["attn.in_proj_bias"], None, None, False, 0.0,
            w["attn.out_proj.weight"], w["attn.out_proj.bias"], attn_mask=mask, need_weights=False,
        )  # fmt: skip
        x = x + attended.transpose(0, 1) * w.get("ls_1.gamma", 1)
        h = F.linear(norm(w, "ln_2", x), w["mlp.c_fc.weight"], w["mlp.c_fc.bias"])
        h = h * torch.sigmoid(1.702 * h) if quick_gelu else F.gelu(h)
        x = x + F.linear(h, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"]) * w.get("ls_2.gamma", 1)
    return x


def random_captions(lengths, *, context_length=77, vocab_size=49408, seed=0):
    """Captions of the given lengths, start and end token included, zero-padded: int64 [n, context_length]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(lengths), context_length, dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, vocab_size - 2, (length,), generator=generator)
        row[0], row[length - 1] = vocab_size - 2, vocab_size - 1
    return tokens
