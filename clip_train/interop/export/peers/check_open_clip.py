"""Features by open_clip, from the exported folder."""

import open_clip
import torch
from peer_io import FOLDER, read_files, read_tensors, write_features

model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}", require_pretrained=True)
tokenizer = open_clip.get_tokenizer(f"local-dir:{FOLDER}")
model.eval()
pixels, tokens = map(torch.from_numpy, read_tensors())
pictures, texts = read_files()
with torch.no_grad():
    write_features(
        image=model.encode_image(pixels),
        text=model.encode_text(tokens),
        file_image=model.encode_image(torch.stack([preprocess(picture) for picture in pictures])),
        file_text=model.encode_text(tokenizer(texts)),
    )
