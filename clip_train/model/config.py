"""Choices of `model=`. The rows are the YAML files in `configs/model/`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from clip_train.errors import UserError

if TYPE_CHECKING:
    from clip_train.model.clip import CLIP

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Ragged(StrEnum):
    auto = "auto"
    packed = "packed"
    buckets = "buckets"
    off = "off"


class TimmPool(StrEnum):
    avg = "avg"
    max = "max"
    token = "token"
    map = "map"
    abs_attn = "abs_attn"
    rot_attn = "rot_attn"
    own = "own"


class TimmProjection(StrEnum):
    none = "none"
    linear = "linear"
    mlp = "mlp"


class TextPool(StrEnum):
    end = "end"
    last = "last"


@dataclass(slots=True, kw_only=True)
class VisionConfig:
    """Image tower on square images: a vision transformer (ViT-B-32's by default), with `resnet_stages` a ResNet, with
    `timm` any image model of timm."""

    image_size: int = 0
    """Height and width of the input, pixels; 0 takes what timm's data config says, without `timm` 224."""
    patch_size: int = 32
    """Height and width of a transformer's patch, pixels; divides `image_size`."""
    width: int = 768
    """Channels of the residual stream; of a ResNet, of its first stage."""
    layers: int = 12
    """Transformer blocks; a ResNet has `resnet_stages` instead."""
    heads: int = 12
    """Attention heads; divides `width`. Of a ResNet, those of its attention pool; divides 32 times `width`."""
    resnet_stages: list[int] = field(default_factory=list)
    """Blocks of the four stages of a ResNet; empty for a vision transformer."""
    mlp_ratio: float = 4.0
    """Hidden channels of a block's MLP over `width`, rounded down."""
    layer_scale: float | None = None
    """Start value of a learned gain per channel on each residual branch; null for none."""
    unlocked_blocks: int | None = None
    """Blocks at the tower's end that train, with what follows them; the rest keeps its weights. 0 locks the whole tower
    (LiT); null trains all of it."""
    cache_features: bool = False
    """Compute the features of a wholly locked tower once for all training pictures, before the first step, and read
    them from RUN/features/ afterwards: no picture is decoded again. Pictures are seen whole, as in evaluation."""
    timm: str | None = None
    """Name of a model of timm that takes the place of this library's towers, such as `convnext_base`; the sizes above
    other than `image_size` are then its own. null for none."""
    timm_pool: TimmPool = TimmPool.avg
    """How a timm model's grid becomes one vector: `avg`, `max`, `token` (class token), `map` (attention pool of its
    own), `abs_attn` or `rot_attn` (open_clip's attention pools over convolutions), `own` (what the model does)."""
    timm_proj: TimmProjection = TimmProjection.linear
    """From a timm model's vector to the shared embedding: `linear`, `mlp` (one hidden layer, twice as wide), or `none`,
    which needs a model as wide as the embedding."""
    timm_proj_bias: bool = False
    """Whether the last layer of `timm_proj` has a bias."""
    timm_act: str | None = None
    """Activation of a timm transformer by timm's name for it, such as `gelu_tanh`; null for the model's own."""
    pretrained: bool = False
    """Start a timm model from timm's own weights, from the hub or its cache; the text tower starts fresh."""

    def __post_init__(self) -> None:
        if self.timm is not None:
            self._check_timm()
            return
        if self.pretrained:
            raise UserError("model.vision.pretrained=true needs model.vision.timm=NAME: the weights are timm's")
        if self.resnet_stages:
            self._check_resnet()
            return
        _check_tower(self.width, self.layers, self.heads, tower="vision")
        if self.patch_size < 1 or self.image_size < 0 or self.image_size % self.patch_size:
            raise UserError(
                f"model.vision.image_size={self.image_size} must be a multiple of "
                f"model.vision.patch_size={self.patch_size}"
            )
        if not self.mlp_ratio > 0:
            raise UserError(f"model.vision.mlp_ratio={self.mlp_ratio} must be positive")

    def _check_timm(self) -> None:
        if self.image_size < 0:
            raise UserError(f"model.vision.image_size={self.image_size} must be positive")
        if self.timm_proj is TimmProjection.none and self.timm_proj_bias:
            raise UserError("model.vision.timm_proj_bias=true needs a projection: model.vision.timm_proj=linear or mlp")

    def _check_resnet(self) -> None:
        if len(self.resnet_stages) != 4 or min(self.resnet_stages) < 1:
            raise UserError(f"model.vision.resnet_stages={self.resnet_stages} must be four positive numbers of blocks")
        if self.image_size < 0 or self.image_size % 32:
            raise UserError(f"model.vision.image_size={self.image_size} of a ResNet must be a multiple of 32")
        if self.width < 2 or self.width % 2 or self.heads < 1 or 32 * self.width % self.heads:
            raise UserError(
                f"model.vision.width={self.width} of a ResNet must be even, and model.vision.heads={self.heads} must "
                "divide 32 times the width"
            )


@dataclass(slots=True, kw_only=True)
class TextConfig:
    """Text tower: a transformer, causal and read at the end token by default. The sizes are those of ViT-B-32."""

    context_length: int = 77
    """Tokens of the longest caption, start and end token included."""
    vocab_size: int = 49408
    """Rows of the token embedding. In training the tokenizer sets it."""
    end_id: int | None = None
    """Id of the token at which a caption is read, at its first place; null: the largest id of the caption, as in CLIP.
    In training the tokenizer sets it."""
    width: int = 512
    """Channels of the residual stream."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 8
    """Attention heads; divides `width`."""
    unlocked_blocks: int | None = None
    """As `model.vision.unlocked_blocks`."""
    mlp_ratio: float = 4.0
    """Hidden channels of a block's MLP over `width`, rounded down."""
    causal: bool = True
    """Whether a token sees only what precedes it. Without, it sees the whole context, padding too, as in SigLIP."""
    pool: TextPool = TextPool.end
    """The position that is read: the `end` token, or the `last` one of the context, as in SigLIP."""
    pad_id: int = 0
    """Id that fills the context after a caption; matters where padding is seen (`causal=false`, `pool=last`). In
    training the tokenizer sets it."""
    proj_bias: bool = False
    """Whether the projection to the shared embedding has a bias, as in SigLIP."""
    norm_eps: float = 1e-5
    """Added to the variance in layer norms; 1e-6 in SigLIP."""
    gelu_tanh: bool = False
    """GELU's approximation by tanh in place of GELU, as in SigLIP 2 and in the weights of SigLIP's authors."""

    def __post_init__(self) -> None:
        _check_tower(self.width, self.layers, self.heads, tower="text")
        if not self.mlp_ratio > 0:
            raise UserError(f"model.text.mlp_ratio={self.mlp_ratio} must be positive")
        if not self.norm_eps > 0:
            raise UserError(f"model.text.norm_eps={self.norm_eps} must be positive")
        for key, value in (("end_id", self.end_id), ("pad_id", self.pad_id)):
            if value is not None and not 0 <= value < self.vocab_size:
                raise UserError(f"model.text.{key}={value} must lie below model.text.vocab_size={self.vocab_size}")
        if self.context_length < 3:
            raise UserError(
                f"model.text.context_length={self.context_length} must be at least 3: start token, one token, end token"
            )

    @property
    def sees_padding(self) -> bool:
        """Whether features depend on the padding, so that captions must fill the context."""
        return not self.causal or self.pool is TextPool.last


@dataclass(slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA, Hu et al. 2022) on all matrices of the unlocked transformer blocks.

    With them, only they, the temperature and the bias train. `load` and exports merge them into the matrices.
    """

    rank: int = 0
    """Columns of each adapter; 0 for none."""
    alpha: float | None = None
    """Adapters are multiplied by alpha / rank; null: by 1."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"model.lora.rank={self.rank} must be 0 (no adapters) or positive")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"model.lora.alpha={self.alpha} must be positive")


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """An image tower and a text tower that meet in one embedding space."""

    name: str = "???"
    """The row's name, as in `configs/model/`."""
    embed_dim: int = 512
    """Width of the shared embedding."""
    quick_gelu: bool = False
    """x * sigmoid(1.702 x) in place of GELU, in both towers. OpenAI's weights need it. timm's models keep their own."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    mean: list[float] = field(default_factory=list)
    """Subtracted from the pixels in [0, 1], per channel (RGB); empty takes that of timm's data config, without
    `vision.timm` OpenAI CLIP's."""
    std: list[float] = field(default_factory=list)
    """Divides the pixels after `mean`, per channel (RGB); empty as for `mean`."""
    squash: bool = False
    """How pictures become square where they are not cropped at random: true resizes both sides, as for SigLIP, false
    the short side and crops the centre."""
    init_logit_scale: float = math.log(1 / 0.07)
    """Start value of the log inverse temperature."""
    init_logit_bias: float | None = None
    """Start value of the bias on the logits, for sigmoid losses; null for none."""
    matryoshka: list[int] = field(default_factory=list)
    """Sizes, ascending and below `embed_dim`, at which the first dimensions of an embedding shall serve by themselves:
    the loss is the mean over these prefixes and the whole. Empty for none."""
    ragged: Ragged = Ragged.auto
    """How captions shorter than the context are computed, exactly in every case: `packed` lays them end to end (CUDA
    in bf16 or fp16), `buckets` groups them by length, `off` keeps all padding. `auto` is `packed` where that runs, else
    `buckets`."""
    patch_dropout: float = 0.0
    """Share of the patches that each training image loses (FLIP); 0 keeps all. For vision transformers, timm's too."""
    checkpointing: int = 0
    """Recompute every k-th transformer block in the backward pass to save memory; 0 recomputes none, 1 all. A ResNet
    is never recomputed: its batch norms would count the batch twice. A timm model recomputes all of its blocks (1)."""
    init: str | None = None
    """Weights to start from: anything that `clip_train.load` takes. Position tables are interpolated to other image
    sizes and context lengths. null: random weights."""
    init_strict: bool = True
    """Refuse `init` weights that are missing, left over or of another shape; false leaves them as drawn."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    compile: bool = False
    """Compile each transformer block with torch.compile: minutes at the start, then faster steps on a GPU."""

    def __post_init__(self) -> None:
        for tower, count in (("vision", self.vision.unlocked_blocks), ("text", self.text.unlocked_blocks)):
            if count is not None and count < 0:
                raise UserError(f"model.{tower}.unlocked_blocks={count} must be 0 (all locked) or positive, or null")
        if self.vision.cache_features and self.vision.unlocked_blocks != 0:
            raise UserError("model.vision.cache_features=true needs a locked tower: model.vision.unlocked_blocks=0")
        if self.vision.unlocked_blocks == 0 and self.text.unlocked_blocks == 0:
            raise UserError("model.vision.unlocked_blocks=0 and model.text.unlocked_blocks=0 leave nothing to train")
        if self.embed_dim < 1:
            raise UserError(f"model.embed_dim={self.embed_dim} must be positive")
        self._fill_what_the_tower_decides()
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"model.mean={self.mean} and model.std={self.std} need three values each, std positive")
        sizes = list(self.matryoshka)
        if sizes != sorted(set(sizes)) or (sizes and not 0 < sizes[0] <= sizes[-1] < self.embed_dim):
            raise UserError(
                f"model.matryoshka={sizes} must ascend and lie between 0 and model.embed_dim={self.embed_dim}"
            )
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"model.patch_dropout={self.patch_dropout} must lie in [0, 1)")
        if self.patch_dropout > 0 and self.vision.resnet_stages and self.vision.timm is None:
            raise UserError(
                f"model.patch_dropout={self.patch_dropout} needs a vision transformer; a ResNet has no patches"
            )
        if self.checkpointing < 0:
            raise UserError(f"model.checkpointing={self.checkpointing} must be 0 or a positive number of blocks")
        if self.checkpointing > 1 and self.vision.timm is not None:
            raise UserError(
                f"model.checkpointing={self.checkpointing}: a timm model recomputes all of its blocks or none, 1 or 0"
            )
        if self.text.sees_padding and self.ragged in (Ragged.packed, Ragged.buckets):
            raise UserError(
                f"model.ragged={self.ragged} leaves out the padding, which this text tower sees (model.text.causal="
                f"{str(self.text.causal).lower()}, model.text.pool={self.text.pool}); take model.ragged=auto"
            )

    @property
    def has_second_layout(self) -> bool:
        """Whether open_clip keeps the text tower of such a model under `text.` (its `CustomTextCLIP`)."""
        return self.text.sees_padding or self.text.proj_bias

    def _fill_what_the_tower_decides(self) -> None:
        if self.mean and self.std and self.vision.image_size:
            return
        image_size = 224
        mean: tuple[float, ...] = CLIP_MEAN
        std: tuple[float, ...] = CLIP_STD
        if self.vision.timm is not None:
            from clip_train.model.timm_encoder import data_config

            image_size, mean, std = data_config(self.vision.timm)
        self.mean, self.std = self.mean or list(mean), self.std or list(std)
        if not self.vision.image_size:
            self.vision = replace(self.vision, image_size=image_size)  # checks it, too

    def build(self, *, seed: int) -> CLIP:
        """Make the model on the CPU with random weights that depend on `seed` alone, for a timm tower too.

        Raises:
            UserError: a timm model is unknown or does not go with an option.
        """
        import torch

        from clip_train.model.clip import CLIP

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return CLIP(self)


def _check_tower(width: int, layers: int, heads: int, *, tower: str) -> None:
    for field_name, value in (("width", width), ("layers", layers), ("heads", heads)):
        if value < 1:
            raise UserError(f"model.{tower}.{field_name}={value} must be positive")
    if width % heads:
        raise UserError(f"model.{tower}.width={width} must be a multiple of model.{tower}.heads={heads}")
