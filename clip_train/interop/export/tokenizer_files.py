"""CLIP's vocabulary as transformers reads it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from clip_train.tokenizer.bpe import byte_letters, merge_lines

if TYPE_CHECKING:
    from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer_files(folder: Path, *, context_length: int) -> None:
    """Write `vocab.json`, `merges.txt`, `tokenizer_config.json` and `special_tokens_map.json` of `CLIPTokenizer`."""
    letters = byte_letters()
    merges = merge_lines()
    spellings = [*letters, *(f"{letter}</w>" for letter in letters), *(m.replace(" ", "") for m in merges), START, END]
    vocabulary = {spelling: i for i, spelling in enumerate(spellings)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", settings | special)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file for people and libraries."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
