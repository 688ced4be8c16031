"""Features by OpenAI's clip, from the exported archive and its unmodified loader."""

import clip
import torch
from peer_io import FOLDER, read_files, read_tensors, write_features

model, preprocess = clip.load(str(FOLDER / "openai_clip.pt"), device="cpu")
pixels, tokens = map(torch.from_numpy, read_tensors())
pictures, texts = read_files()
with torch.no_grad():
    write_features(
        image=model.encode_image(pixels),
        text=model.encode_text(tokens),
        file_image=model.encode_image(torch.stack([preprocess(picture) for picture in pictures])),
        file_text=model.encode_text(clip.tokenize(texts, context_length=model.context_length, truncate=True)),
    )
