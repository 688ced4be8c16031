"""Full-matrix losses differentiated by autograd, and draws of features: what the tiled losses are compared with."""

import torch
import torch.nn.functional as F

from clip_train.types import Features


def draw(pairs, *, width=32, scale=14.3, seed=0, dtype=torch.float64, bias=None):
    """Features of `pairs` unit rows that require gradients; matching rows are correlated."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(pairs, width, generator=g, dtype=torch.float64)
    text = 0.5 * image + torch.randn(pairs, width, generator=g, dtype=torch.float64)
    tensors = [
        F.normalize(image, dim=-1).to(dtype),
        F.normalize(text, dim=-1).to(dtype),
        torch.tensor(scale, dtype=torch.float64).log().to(dtype),
    ]
    tensors = [t.requires_grad_() for t in tensors]
    return Features(*tensors, None if bias is None else torch.tensor(bias, dtype=dtype).requires_grad_())


def rows_of(features, rows):
    """The part of one rank, as leaves of its own."""
    cut = [t.detach()[rows].clone().requires_grad_() for t in features[:2]]
    rest = [None if t is None else t.detach().clone().requires_grad_() for t in features[2:]]
    return Features(*cut, *rest)


def _kept(features, valid, ids):
    size = len(features.image)
    valid = torch.ones(size, dtype=torch.bool) if valid is None else valid
    keep = valid[:, None] & valid[None, :]
    if ids is not None:
        keep = keep & ((ids[:, None] != ids[None, :]) | torch.eye(size, dtype=torch.bool))
    return valid, keep


def clip_loss(features, *, valid=None, ids=None):
    valid, keep = _kept(features, valid, ids)
    logits = features.logit_scale.exp() * features.image @ features.text.T
    logits = logits.masked_fill(~keep, -torch.inf)[valid][:, valid]
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def siglip_loss(features, *, valid=None, ids=None):
    valid, keep = _kept(features, valid, ids)
    logits = features.logit_scale.exp() * features.image @ features.text.T + features.logit_bias
    sign = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -(F.logsigmoid(sign * logits) * keep).sum() / valid.sum()


def gradients(loss, features):
    """Loss and gradients with respect to every feature tensor, as a list of float64 tensors."""
    leaves = [t for t in features if t is not None]
    return [t.detach().double() for t in (loss, *torch.autograd.grad(loss, leaves))]


def worst_error(got, want):
    """Largest relative error over a list of tensors, each by its norm."""
    return max(((g - w).norm() / w.norm().clamp(min=1e-300)).item() for g, w in zip(got, want, strict=True))
